"""The form of settings: read from the schema and the documentation; recipes and drafts that are kept."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import yaml

pytest.importorskip("starlette", reason="the extra ui is not installed: pip install 'finetune-diffusion[ui]'")

from asgi import opened

from finetune.config.load import load_recipe
from finetune.config.recipe import Recipe
from finetune.core.errors import BadInput
from finetune.ui.drafts import draft_of
from finetune.ui.kept_drafts import KeptDrafts
from finetune.ui.settings_list import OWN, free_settings
from finetune.ui.uploads import Uploads


def leaves(values: dict, prefix: str = "") -> set[str]:
    found = set()
    for name, value in values.items():
        key = f"{prefix}{name}"
        found |= leaves(value, f"{key}.") if isinstance(value, dict) and value else {key}
    return found


def test_every_setting_of_a_recipe_can_be_reached_but_files_and_the_pages_own() -> None:
    """A complete recipe, as a run writes it, has no key that the form lacks."""
    left = {
        "data.photos",
        "data.subjects",
        "prior.folder",
        "prior.others.prompts",
        "run.dir",
        "sample.image",
        "sample.mask",
        "sample.depth",
    }
    for name in ("dreambooth-lora", "dreambooth-full", "style-lora", "textual-inversion", "pivotal", "demo-oft"):
        recipe = load_recipe(name)
        assert isinstance(recipe, Recipe)
        whole = leaves(recipe.model_dump(mode="json"))
        reached = {key for key in whole if key in free_settings() or f"{key}.kind" in free_settings()}
        others = {key for key in whole - reached if not any(f"{key}.".startswith(f"{own}.") for own in OWN)}
        assert others <= left, name


def test_no_setting_of_the_form_names_files() -> None:
    for key in ("data.photos", "prior.folder", "prior.others.prompts", "run.dir", "sample.image", "data.subjects"):
        assert key not in free_settings()


def test_each_setting_says_what_it_does_and_takes() -> None:
    free = free_settings()
    assert not [key for key, setting in free.items() if not setting.about]
    assert free["method.targets"].choices == ("attention", "all-linear", "conv", "cross-kv")
    assert (free["data.resolution"].kind, free["data.resolution"].least) == ("whole", 8)
    assert (free["data.flip"].kind, free["optim.lr"].kind) == ("switch", "number")
    assert "lora" in free["method.kind"].choices
    assert not [key for key, setting in free.items() if setting.about.endswith(("below", "above"))]
    assert set(free["method.block_size"].of) == {"oft"}
    assert free["data.flip"].about.startswith("also train mirrored copies")


@pytest.mark.parametrize(("value", "on"), [("{}", True), ("null", False)])
def test_a_part_of_a_section_is_switched_on_and_off_as_a_whole(value: str, on: bool) -> None:
    """prior.others is on or off by the base's profile; the form can say the other of both."""
    part = free_settings()["prior.others"]
    assert (part.kind, value in part.choices) == ("part", True)
    assert part.about.startswith("`{}`: ")
    recipe = load_recipe("dreambooth-lora", ["base=tiny", f"prior.others={value}"])
    assert isinstance(recipe, Recipe)
    assert (recipe.prior.others is not None) is on


def test_the_page_is_told_what_the_recipe_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    async def going() -> None:
        async with opened(tmp_path) as browser:
            told = (await browser.post("/api/settings", {"kind": "thing", "base": "tiny"})).told
            chosen, recipe = told["chosen"], load_recipe("dreambooth-lora", ["base=tiny"])
            assert chosen["optim.lr"][0] == recipe.optim.lr
            assert chosen["run.steps"][0] == recipe.run.steps
            assert {setting["key"] for setting in told["settings"]} == set(free_settings())
            assert (await browser.post("/api/settings", {"kind": "thing", "base": "../x"})).status == 422

    asyncio.run(going())


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KeptDrafts:
    monkeypatch.chdir(tmp_path)
    return KeptDrafts(Uploads(tmp_path / "finetune-ui"))


SENT = {
    "base": {"source": "tiny"}, "profile": "subject",
    "data": {"photos": "/home/me/secret", "class_noun": "dog", "flip": False, "templates": ["a {noun} {token}"]},
    "method": {"kind": "dora", "rank": 8}, "prior": {"kind": "none"}, "optim": "adamw",
    "run": {"name": "mine", "dir": "elsewhere", "steps": 30}, "sample": {"image": "x.png", "every": 10},
}  # fmt: skip


def test_a_recipe_that_was_sent_is_the_run_but_for_its_places(kept: KeptDrafts, tmp_path: Path) -> None:
    told = kept.take_recipe(yaml.safe_dump(SENT).encode())
    assert (told["kind"], told["noun"], told["base"]) == ("thing", "dog", "tiny")
    assert told["left"] == ["sample.image"]  # photos, names and places are the page's anyway
    file = kept.recipe(told["file"])
    assert file is not None
    assert "secret" not in file.read_text()
    draft = draft_of({"noun": "cat", "base": "tiny", "more": ["run.steps=40"]}, Path("photos"), {}, file)
    recipe = load_recipe(draft.recipe, draft.settings())
    assert (recipe.method.kind, recipe.method.rank, recipe.sample.every) == ("dora", 8, 10)
    assert (recipe.run.steps, recipe.data.class_noun, recipe.data.photos.name) == (40, "cat", "photos")
    assert recipe.run.dir is None
    (tmp_path / "mine.yaml").write_text(draft.as_yaml())
    assert load_recipe(tmp_path / "mine.yaml") == recipe


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe", b"a: [", b"method: {kind: nothing}", b"x: 1", b"- {}"])
def test_what_is_no_recipe_is_refused_and_not_kept(content: bytes, kept: KeptDrafts, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        kept.take_recipe(content)
    assert str(tmp_path) not in str(caught.value)
    assert not list((tmp_path / "finetune-ui" / "recipes").iterdir())
    for wrong in ("../x", "0" * 16, "x"):
        with pytest.raises(BadInput, match="not here any more"):
            kept.recipe(wrong)


def test_a_draft_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    async def going() -> None:
        async with opened(tmp_path) as browser:
            chosen = (await browser.post("/api/sets")).told["set"]
            await browser.put(f"/api/sets/{chosen}/files?name=a.txt", b"a")
            draft = {"kind": "thing", "noun": "mug", "more": "run.steps=3", "set": "../x", "other": "x", "base": 5}
            assert (await browser.post(f"/api/sets/{chosen}/draft", draft)).status == 200
            told = (await browser.get(f"/api/sets/{chosen}")).told["draft"]
            assert told == {"kind": "thing", "noun": "mug", "more": "run.steps=3"}
            (one,) = (await browser.get("/api/home")).told["sets"]
            assert (one["name"], one["noun"], one["photos"]) == (chosen, "mug", 0)
            (tmp_path / "finetune-ui" / "drafts" / f"{chosen}.json").write_text("{")
            assert (await browser.get(f"/api/sets/{chosen}")).told["draft"] == {}
            assert json.loads((await browser.get("/api/home")).body)["sets"][0]["noun"] == ""

    asyncio.run(going())

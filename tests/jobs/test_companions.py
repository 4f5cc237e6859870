"""What lies beside an export, read by the hub's own reader; pictures that come from the file; what a file says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_photos
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from finetune import load_recipe, train
from finetune.cli.main import run as command
from finetune.export.card import Card, licence_of, model_card
from finetune.families.source import load_family
from finetune.jobs.evaluated import ToldWords, find_source
from finetune.jobs.open import open_result
from finetune.jobs.previews import from_file
from finetune.runs.folder import RunFolder
from finetune.sampling.draw import draw
from finetune.sampling.settings import Sampling

SETTINGS = (
    "data.class_noun=mug", "data.token=zwx", "prior.kind=none", "sample.steps=2", "sample.count=1", "run.steps=3",
    "sample.prompts=['a photo of {token} {noun}', 'a {noun} in snow']", "optim.lr=1e-2", "run.name=mine",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tiny_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose own card states its licence."""
    folder = tmp_path_factory.mktemp("licensed") / "base"
    shutil.copytree(tiny_bases["sd1"], folder)
    (folder / "README.md").write_text("---\nlicense: creativeml-openrail-m\ntags:\n- x\n---\n# Base\n")
    return folder


def made(base: Path, photos: Path, out: Path, recipe: str = "dreambooth-lora", *more: str) -> Path:
    return train(load_recipe(recipe, [f"base={base}", f"data.photos={photos}", *SETTINGS, *more]), out)


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a recipe, to be looked at alone: trained when a test first asks for it."""
    folder = tmp_path_factory.mktemp("companions")
    photos = write_photos(folder / "photos")
    return cache(lambda recipe: made(base, photos, folder / recipe, recipe))


def test_the_hub_reads_the_model_card(runs: Callable[[str], Path]) -> None:
    run = runs("dreambooth-lora")
    card = ModelCard.load(run / "exports" / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["instance_prompt"], data["library_name"]) == (
        "creativeml-openrail-m", "zwx mug", "diffusers",
    )  # fmt: skip
    assert "template:sd-lora" in data["tags"]
    for item, prompt in zip(data["widget"], ("a photo of zwx mug", "a mug in snow"), strict=True):
        assert item["text"] == prompt
        assert (run / "exports" / item["output"]["url"]).is_file()
    for words in ("mine.safetensors", "modules re-read", "learning rate", "Write `zwx mug`"):
        assert words in card.text
    assert str(run.parent) not in card.content


def test_the_sidecar_is_what_uis_read(runs: Callable[[str], Path]) -> None:
    run = runs("dreambooth-lora")
    about = json.loads((run / "exports" / "mine.json").read_text())
    assert (about["activation text"], about["sd version"], about["preferred weight"]) == ("zwx mug", "SD1", 1.0)
    image = Image.open(run / "exports" / "mine.png")
    assert image.info["parameters"].startswith("a photo of zwx mug\n")


def test_a_card_states_no_licence_that_nobody_stated(tmp_path: Path) -> None:
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").write_text("# no front matter\nlicense: mit\n")
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert licence_of(tmp_path) is None


@pytest.mark.parametrize("recipe", ["dreambooth-lora", "dreambooth-full"])
def test_the_pictures_after_are_those_of_the_exported_file(
    recipe: str, base: Path, runs: Callable[[str], Path]
) -> None:
    """Drawn again from the file in fp16 on a clean base; what was in memory (fp32) gives other pixels."""
    run = runs(recipe)
    after = np.asarray(Image.open(run / "samples" / "after" / "00-0.png"), np.int16)
    exported = "mine.safetensors" if recipe == "dreambooth-lora" else "mine-model"
    if recipe == "dreambooth-lora":
        family, _ = open_result(run / "exports" / exported, str(base))
    else:
        family = load_family(str(run / "exports" / exported))
    settings = {
        "steps": 2,
        "guidance": RunFolder(run).recipe.sample.guidance,
    }
    again = draw(
        family, ["a photo of zwx mug", "a mug in snow"], Sampling(size=after.shape[0], **settings), seeds=[0, 0]
    )[0]
    assert np.array_equal(np.asarray(again, np.int16), after)


@pytest.mark.parametrize("level", ["minimal", "standard", "full"])
def test_what_a_file_says_of_itself(level: str, base: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "0.txt").write_text("{token} mug in night city")
    unchecked = ("export.verify=off", "sample.steps=1")
    run = made(base, photos, tmp_path / "run", "dreambooth-lora", f"export.metadata={level}", *unchecked)
    with safe_open(run / "exports" / "mine.safetensors", "pt") as opened:
        said = opened.metadata()
    assert (said["ss_network_dim"], said["modelspec.architecture"]) == ("16", "stable-diffusion-v1/lora")
    assert ("modelspec.trigger_phrase" in said) == ("finetune_base_hash" in said) == (level != "minimal")
    assert ("night city" in json.dumps(said)) == (str(photos) in json.dumps(said)) == (level == "full")
    assert (said.get("ss_num_train_images") == str(len(list(photos.glob("*.png"))))) == (level != "minimal")
    assert ("ss_training_started_at" in said) == (level != "minimal")
    tags = json.loads(said.get("ss_tag_frequency", "{}"))
    assert tags.get("zwx mug", {}).get("zwx mug in night city") == (1 if level == "full" else None)
    before = (run / "exports" / "mine.safetensors").read_bytes()
    assert command(["resume", str(run)])[0] == 0  # writes run.json again
    assert command(["export", str(run), "--to", "kohya", "--verify", "off"])[0] == 0
    assert (run / "exports" / "mine.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("base", "said"), [("owner/model", '"owner/model").to('), ("my-folder", "the path of this folder")]
)
def test_a_card_says_where_the_base_is(base: str, said: str) -> None:
    assert said in model_card(card_of(base))


def test_the_cards_snippet_draws_with_the_tiny_base() -> None:
    """`tiny` is no hub id, and its files are fp16: the lines that are pasted must find it, and must draw."""
    code = model_card(card_of("tiny")).split("```python\n")[1].split("```")[0]
    found: dict[str, Any] = {}
    assert code.count('pipeline("zwx mug")') == 1
    exec(code.replace('pipeline("zwx mug")', 'drawn = pipeline("zwx mug", num_inference_steps=1)'), found)
    assert found["drawn"].size == (128, 128)


def card_of(base: str) -> Card:
    return Card("mine", "zwx mug", "sd1", base, None, (), {}, [], [])


@pytest.fixture(scope="module")
def flux(tiny_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of Flux with its text encoder, and a preview."""
    folder = tmp_path_factory.mktemp("flux")
    more = ("method.parts=[denoiser,text_encoders]", "sample.every=2", "export.verify=deltas")
    return made(tiny_bases["flux"], write_photos(folder / "photos"), folder / "run", "dreambooth-lora", *more)


def test_a_flux_run_says_which_file_is_for_whom(flux: Path) -> None:
    """UIs are pointed to the joined file, diffusers to its own; what the text encoder costs stands on each page."""
    assert any(key.endswith("_qkv.alpha") for key in load_file(flux / "exports" / "mine.safetensors"))
    card = ModelCard.load(flux / "exports" / "README.md").text
    assert 'weight_name="mine-diffusers/pytorch_lora_weights.safetensors"' in card
    for text in (card, (flux / "report.html").read_text()):
        assert "sdnext: refused, drops the whole file" in text
        assert "InvokeAI: refused, raises when it draws" in text
    planned = json.loads((flux / "run.json").read_text())["plan"]["exports"]
    assert "sdnext drops the whole file; InvokeAI raises when it draws (diffusers file)" in planned
    assert "method.parts=[denoiser]" in planned


def test_a_joined_preview_is_drawn_and_read_back(flux: Path) -> None:
    held = load_file(flux / "previews" / "mine-000002.safetensors")
    assert any(key.endswith("_linear1.lora_up.weight") for key in held)
    assert list((flux / "samples" / "step-000002").glob("*.png"))


def test_a_preview_bears_columns_of_zeros(flux: Path, tmp_path: Path, tiny_bases: dict[str, Path]) -> None:
    """A joined matrix does not say whose a column of zeros is. The method still gets matrices of its own rank."""
    folder = RunFolder(shutil.copytree(flux, tmp_path / "run"))
    family, method = load_family(str(tiny_bases["flux"])), folder.recipe.method.adapter
    parameters = method.attach(family, 0)
    made = torch.Generator().manual_seed(0)
    queries = next(name for name in parameters if name.endswith("to_q.lora_B.default.weight"))
    with torch.no_grad():
        for name, value in parameters.items():
            if ".lora_B." in name:
                value.copy_(torch.randn(value.shape, generator=made))
        parameters[queries][:, 1:] = 0
    before = {name: value.clone() for name, value in parameters.items()}
    layer = family.parts["denoiser"].get_submodule(queries.split(".lora_B")[0].removeprefix("denoiser."))
    wanted = layer.get_delta_weight("default")
    with from_file(folder, family, 1):
        assert torch.allclose(layer.get_delta_weight("default"), wanted, atol=5e-3)
    assert all(torch.equal(value, before[name]) for name, value in parameters.items())


def test_an_older_run_still_opens_and_is_exported_under_the_new_names(
    flux: Path, tmp_path: Path, tiny_bases: dict[str, Path]
) -> None:
    """Before, the diffusers form was NAME.safetensors and the joined one NAME-kohya.safetensors."""
    run = shutil.copytree(flux, tmp_path / "run")
    exports = run / "exports"
    (exports / "mine.safetensors").rename(exports / "mine-kohya.safetensors")
    (exports / "mine-diffusers" / "pytorch_lora_weights.safetensors").rename(exports / "mine.safetensors")
    (exports / "mine-diffusers").rmdir()
    listed = json.loads((run / "exports.json").read_text())
    old = {"kohya": "exports/mine-kohya.safetensors", "diffusers": "exports/mine.safetensors"}
    for item in listed:
        item.pop("limits")
        item["path"] = old.get(item["format"], item["path"])
    (run / "exports.json").write_text(json.dumps(listed))
    for name in old.values():
        open_result(run / name, str(tiny_bases["flux"]))
    assert command(["report", str(run)])[0] == 0
    assert "mine-kohya.safetensors" in (run / "report.html").read_text()
    assert command(["export", str(run), "--to", "kohya", "--verify", "off"])[0] == 0
    now = {item["format"]: item["path"] for item in json.loads((run / "exports.json").read_text())}
    assert now == {"kohya": "exports/mine.safetensors", "peft": "exports/mine-peft"}


def test_a_new_word_in_place_of_the_noun_is_called_by_that_word_alone(runs: Callable[[str], Path]) -> None:
    """The captions of these recipes have the token and no noun, though the run knows the noun."""
    run = runs("pivotal")
    info = RunFolder(run).info
    word = info.token
    assert (info.class_noun, info.trigger) == ("mug", word)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert f"<h1>“{escape(word)}”</h1>" in page
    assert f"Write <b>{escape(word)}</b> in a prompt" in page
    assert f"{escape(word)} mug" not in page.split("Before and after")[0]
    card = (run / "exports" / "README.md").read_text(encoding="utf-8")
    assert f"Write `{word}` in a prompt" in card
    with safe_open(run / "exports" / "mine.safetensors", "pt") as opened:
        assert opened.metadata()["modelspec.trigger_phrase"] == word
    called = find_source(run, ToldWords(None, None), None, None, 1.0).called
    assert called.prompt("a {token} {noun} in snow").text == f"a {word} in snow"

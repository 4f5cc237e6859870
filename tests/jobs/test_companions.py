"""What lies beside an export, read by the hub's own reader; pictures that come from the file; what a file says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import write_photos
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open

from finetune import load_recipe, train
from finetune.export.card import Card, licence_of, model_card
from finetune.jobs.open import open_result
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
    from finetune.families.source import load_family

    if recipe == "dreambooth-lora":
        family, _ = open_result(run / "exports" / exported, str(base))
    else:
        family = load_family(str(run / "exports" / exported))
    settings = {
        "steps": 2,
        "guidance": load_recipe(recipe, ["data.photos=x", *SETTINGS]).sample.guidance,
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


@pytest.mark.parametrize(
    ("base", "said"), [("owner/model", '"owner/model")'), ("my-folder", "the path of this folder")]
)
def test_a_card_says_where_the_base_is(base: str, said: str) -> None:
    assert said in model_card(card_of(base))


def test_the_cards_snippet_opens_the_tiny_base() -> None:
    """`tiny` is no hub id: the lines that are pasted must find it."""
    code = model_card(card_of("tiny")).split("```python\n")[1].split("```")[0]
    found: dict[str, object] = {}
    exec("\n".join(line for line in code.splitlines() if not line.startswith("pipeline(")), found)
    assert type(found["pipeline"]).__name__ == "StableDiffusionPipeline"


def card_of(base: str) -> Card:
    return Card("mine", "zwx mug", "sd1", base, None, (), {}, [], [])

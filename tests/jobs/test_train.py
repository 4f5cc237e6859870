"""The whole job, in process, on small random bases of every family and on every shipped recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_companions
from ends import metrics, resumed_is_the_unbroken_run
from PIL import Image
from safetensors.torch import load_file

from finetune.config import recipes
from finetune.config.load import load_recipe, parse_recipe
from finetune.core.errors import BadInput
from finetune.families.codec import VaeCodec
from finetune.families.parts import Parts
from finetune.families.registry import FAMILIES
from finetune.families.source import load_family
from finetune.jobs import images as image_files
from finetune.jobs import train as job
from finetune.jobs.open import open_result
from finetune.jobs.prepare import prepare
from finetune.sampling.draw import draw
from finetune.sampling.images import save_image
from finetune.sampling.settings import Sampling

SHORT = {"steps": 2, "checkpoint_every": 1}
LOOK = {"count": 1, "steps": 1, "prompts": ["a photo of {token} {noun}", "a photo of a {noun}"]}
LORA, FULL = {"kind": "lora", "rank": 2}, {"kind": "full"}


def settings(base: Path | str, photos: Path, method: dict, **sections: dict) -> dict:
    return {
        "base": str(base),
        "data": {"photos": str(photos), "class_noun": "mug"},
        "prior": {"kind": "class_images", "count": 2, "steps": 1},
        "method": method,
        "optim": {"kind": "adamw", "lr": 1e-3},
        "run": SHORT,
        "sample": LOOK,
    } | sections


@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_from_photos_to_page(
    family: str, method: dict, tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    recipe = parse_recipe(settings(tiny_bases[family], photos, method))
    run = job.train(recipe, tmp_path / "run", lines.append)
    page = (run / "report.html").read_text(encoding="utf-8")
    read = family == "sdxl-refiner"  # which draws from an image
    maps = 0 if family in ("sd3", "flux") else 3  # two words of one prompt, and one of the other
    # photos; before and after of two prompts, and again with their difference; class images
    assert page.count("<img") == 3 + 2 * 2 + 2 * 3 + 2 + read + maps
    assert "http" not in page.replace("http-equiv", "")
    assert str(tmp_path) not in json.dumps([load_metadata(file) for file in (run / "exports").rglob("*.safetensors")])
    exported = json.loads((run / "exports.json").read_text())
    assert all(check.startswith("ok: ") for item in exported for check in item["checks"])
    assert {item["format"] for item in exported} == ({"kohya", "diffusers", "peft"} if method is LORA else {"folder"})
    assert any("class images" in line for line in lines)
    for name in ("before", "after"):
        names = ["00-0.png", "01-0.png", *(["input-image.png"] if read else [])]
        assert sorted(file.name for file in (run / "samples" / name).iterdir()) == names


def load_metadata(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as held:
        return held.metadata() or {}


def test_a_stopped_job_goes_on_to_the_same_weights(tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    """Ctrl-C in the third step of four; `resume` ends with the unbroken run's weights and metrics, bit for bit."""
    recipe = parse_recipe(settings(tiny_bases["sd1"], photos, LORA, run={"steps": 4, "checkpoint_every": 2}))
    resumed_is_the_unbroken_run(recipe, tmp_path)


def test_a_finished_run_draws_again_what_it_drew(tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    from finetune.sampling.draw import draw

    run = job.train(parse_recipe(settings(tiny_bases["sd1"], photos, LORA)), tmp_path / "run")
    family, info = open_result(run)
    again = draw(family, info.prompts, Sampling(steps=1, guidance=info.guidance, size=info.resolution), seeds=[0, 0])
    for number, image in enumerate(again):
        with Image.open(run / "samples" / "after" / f"{number:02d}-0.png") as held:
            assert held.tobytes() == image.tobytes()


def test_resuming_a_finished_run_says_that_nothing_is_left(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    run = job.train(parse_recipe(settings(tiny_bases["sd1"], photos, LORA)), tmp_path / "run", said.append)
    assert not any("nothing is left to train" in line for line in said)
    job.resume(run, said.append)
    (line,) = [line for line in said if "nothing is left to train" in line]
    assert line.endswith(f"finetune train {run}/recipe.yaml run.dir={run} run.steps=N")


def test_a_kill_while_pictures_are_drawn_leaves_no_short_set(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = save_image
    monkeypatch.setattr(image_files, "save_image", lambda image, path, text: die(path, saved, image, text))
    recipe = parse_recipe(settings(tiny_bases["sd1"], photos, LORA))
    with pytest.raises(KeyboardInterrupt):
        job.train(recipe, tmp_path / "run")
    monkeypatch.undo()
    run = job.train(recipe, tmp_path / "run")
    assert len(list((run / "samples" / "before").iterdir())) == 2


def die(path: Path, saved: object, image: Image.Image, text: str) -> None:
    if path.name.startswith("01"):
        raise KeyboardInterrupt
    saved(image, path, text)  # type: ignore[operator]


def test_a_resolution_that_latents_cannot_have_is_refused(tiny_bases: dict[str, Path], photos: Path) -> None:
    data = {"photos": str(photos), "class_noun": "mug", "resolution": 65}
    with pytest.raises(BadInput, match=r"data\.resolution is 65"):
        prepare(parse_recipe(settings(tiny_bases["sd1"], photos, LORA, data=data)))


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"sample": LOOK | {"sampler": "ddim"}}, "sampler 'ddim' is for diffusion"),
        ({"prior": {"kind": "class_images", "sampler": "ddim"}}, "sampler 'ddim' is for diffusion"),
        ({"objective": {"weighting": "min_snr"}}, "this base is a flow"),
        ({"objective": {"prediction": "epsilon"}}, "trained with 'flow_prediction'"),
        ({"base": {"without": ["vae"]}}, "base.without"),
    ],
)
def test_what_a_flow_has_not_is_refused_before_anything_is_drawn(
    sections: dict, said: str, tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    base = {"source": str(tiny_bases["sd3"])} | sections.get("base", {})
    asked = parse_recipe(settings("tiny", photos, LORA) | sections | {"base": base})
    with pytest.raises(BadInput, match=said):
        job.train(asked, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# a word of a recipe's base -> its family and extra inputs; the first that is in it
STAND_INS = {
    "inpainting": ("sd1", "inpaint"), "-depth": ("sd2", "depth"), "pix2pix": ("sd1", "edit"),
    "refiner": ("sdxl-refiner", None), "xl": ("sdxl", None), "diffusion-v1": ("sd1", None),
    "diffusion-2": ("sd2", None), "diffusion-3": ("sd3", None), "FLUX": ("flux", None),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", recipes.names())
def test_every_shipped_recipe_trains(
    name: str, tiny_bases: dict[str, Path], wide_bases: dict, photos: Path, tmp_path: Path
) -> None:
    """Two steps of each recipe; where it names a real base, a small random one of that family and inputs stands in."""
    source = load_recipe(name).base.source
    bases: dict[Any, Path] = {(family, None): base for family, base in tiny_bases.items()} | wide_bases
    kind = next((kind for word, kind in STAND_INS.items() if word in source), None)
    stand_in = "tiny" if kind is None else bases[kind]
    if kind is not None and kind[1]:
        write_companions(photos)
    short = [
        f"data.photos={photos}", f"base={stand_in}", "run.steps=2", "sample.steps=1", "sample.count=1",
        "data.token=sks", "data.resolution=null",
        "optim.warmup=0", "optim.lr=1e-3",
        *(["prior.count=2", "prior.others=null",
        "prior.steps=1"] if load_recipe(name).prior.kind == "class_images" else []),
    ]  # fmt: skip
    run = job.train(load_recipe(name, short), tmp_path / "run")
    assert (run / "report.html").is_file()
    exported = json.loads((run / "exports.json").read_text())
    assert all(check.startswith("ok: ") for item in exported for check in item["checks"])
    family = load_family(str(stand_in))
    assert kind in (None, (family.name, family.inputs))
    assert source == "tiny" or kind is not None


def test_tensorboard_gets_every_step(tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = parse_recipe(settings(tiny_bases["sd1"], photos, LORA, run=SHORT | {"trackers": ["tensorboard"]}))
    run = job.train(recipe, tmp_path / "run")
    (file,) = [file for file in run.rglob("events.out.tfevents*") if file.parent.name == "finetune"]
    events = EventAccumulator(str(file.parent)).Reload().Scalars("loss")
    assert [event.value for event in events] == pytest.approx([row["loss"] for row in metrics(run)], rel=1e-6)


@pytest.mark.parametrize("family", ["sd1", "sdxl", "flux"])
def test_a_preview_is_what_its_file_gives(
    family: str, tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """The file of step 1 on a clean base, opened as a stranger's would be, draws the preview of step 1; the trained
    weights, before they were rounded to the file's precision, do not."""
    sample = LOOK | {"every": 1, "prompts": ["a photo of {token} {noun}"], "steps": 2}
    method = LORA | {"alpha": 3, "parts": ["denoiser", "text_encoders"]}
    optim = {"kind": "adamw", "lr": 0.3}  # far enough for a picture to show it
    recipe = parse_recipe(
        settings(tiny_bases[family], photos, method, sample=sample, optim=optim, export={"dtype": "bf16"})
    )
    run = job.train(recipe, tmp_path / "run")
    (file,) = (run / "previews").glob("*-000001.safetensors")
    clean, _ = open_result(file, str(tiny_bases[family]))
    prompt = json.loads((run / "run.json").read_text())["prompts"][0]
    (again,) = draw(clean, [prompt], Sampling(steps=2, guidance=5.0, size=32), seeds=[0])
    (before,) = draw(
        load_family(str(tiny_bases[family])), [prompt], Sampling(steps=2, guidance=5.0, size=32), seeds=[0]
    )
    shown = np.asarray(Image.open(run / "samples" / "step-000001" / "00-0.png"), dtype=int)
    assert np.abs(shown - np.asarray(again, dtype=int)).max() <= 1
    assert np.abs(shown - np.asarray(before, dtype=int)).max() > 3


def test_previews_are_drawn_and_change_nothing(tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    """The same run with and without previews: pictures every step, and the same weights, bit for bit."""
    ends = []
    for every in (0, 1):
        sample = LOOK | {"every": every, "count": 2}
        recipe = settings(tiny_bases["sdxl"], photos, LORA, sample=sample, export={"verify": "off"})
        run = job.train(parse_recipe(recipe), tmp_path / str(every))
        ends.append(load_file(run / "adapter" / "trained.safetensors"))
    assert sorted(path.name for path in (run / "samples").iterdir()) == [
        "after",
        "before",
        "step-000001",
        "step-000002",
    ]
    assert len(list((run / "samples" / "step-000001").iterdir())) == 2  # one of each prompt
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_what_computes_was_put_on_the_device(
    monkeypatch: pytest.MonkeyPatch, tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """A whole job on SDXL: whatever is asked of a part, it is one of those that were placed last. Encoders are placed
    one by one, and the VAE lies beside nothing while latents are made: T5 and Flux need not fit together."""
    placed: list[set[str]] = [set()]
    asked: list[tuple[str, set[str]]] = []
    family_type = FAMILIES["sdxl"]

    def record(part: str) -> None:
        asked.append((part, placed[-1]))

    def watched(kind: type, name: str, part_of: Callable[..., str]) -> None:
        real = getattr(kind, name)

        def call(self: Any, *arguments: Any, **settings: Any) -> Any:
            record(part_of(self, *arguments))
            return real(self, *arguments, **settings)

        monkeypatch.setattr(kind, name, call)

    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    real_place = Parts.place

    def place(self: Any, parts: list[str]) -> None:
        placed.append(set(parts))
        real_place(self, parts)

    monkeypatch.setattr(Parts, "place", place)
    watched(family_type, "encode_text", lambda self, index, prompts: self.text_encoders[index])
    watched(VaeCodec, "encode", lambda self, pixels: "vae")
    watched(family_type, "predict", lambda self, *arguments: "denoiser")
    recipe = settings(tiny_bases["sdxl"], photos, LORA, sample=LOOK | {"every": 1})
    job.train(parse_recipe(recipe), tmp_path / "run")
    assert {part for part, _ in asked} == {"denoiser", "vae", "text_encoder", "text_encoder_2"}
    assert all(part in there for part, there in asked)
    assert all(there == {"vae"} for part, there in asked if part == "vae")
    cached = [there for part, there in asked if part == "text_encoder_2"]
    assert {"text_encoder_2"} in cached  # alone, when prompts are cached
    after_latents = asked[max(n for n, (part, _) in enumerate(asked) if part == "vae") :]
    assert sum(part == "denoiser" and there == {"denoiser"} for part, there in after_latents) == SHORT["steps"]


def test_an_optimiser_that_can_not_work_here_is_refused_before_the_work(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = parse_recipe(settings(tiny_bases["sd1"], photos, LORA, optim={"kind": "paged_adamw8bit"}))
    with pytest.raises(BadInput, match="needs an NVIDIA GPU"):
        job.train(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "samples").exists()

"""The whole job on bases with extra inputs: trained, stopped, resumed, exported, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from ends import resumed_is_the_unbroken_run, weights
from PIL import Image, ImageOps
from safetensors.torch import load_file

from finetune.config.load import parse_recipe
from finetune.core.errors import BadInput
from finetune.families.source import load_family
from finetune.jobs import train as job
from finetune.jobs.prepare import prepare

LORA, FULL = {"kind": "lora", "rank": 2}, {"kind": "full"}
# what is trained on: (family, extra inputs, whether the base is widened for the run, method)
CASES = [
    ("sd1", "inpaint", True, FULL),
    ("sd2", "depth", False, LORA),
    ("sd1", "edit", True, FULL),
    ("sdxl", "inpaint", False, LORA),
]
every_case = pytest.mark.parametrize(
    ("name", "kind", "wide", "method"), CASES, ids=[f"{n}-{k}-{m['kind']}" for n, k, _, m in CASES]
)


@pytest.fixture
def pairs(photos: Path) -> Path:
    """The photos, with a depth map and a picture before each."""
    for file in sorted(photos.glob("*.png")):
        Image.fromarray(np.add.outer(np.arange(40), np.arange(48)).astype(np.uint8)).save(
            photos / f"{file.stem}.depth.png"
        )
        ImageOps.invert(Image.open(file)).save(photos / f"{file.stem}.before.png")
    return photos


def base_of(name: str, kind: str, wide: bool, tiny_bases: dict[str, Path], folder: Path) -> dict:
    """A plain base that the run widens, or one that has the inputs."""
    if wide:
        return {"source": str(tiny_bases[name]), "inputs": kind}
    family = load_family(str(tiny_bases[name]))
    family.widen(kind)
    with torch.no_grad():
        family.parts["denoiser"].conv_in.weight.normal_(generator=torch.Generator().manual_seed(3))
    family.drawing.pipeline().save_pretrained(folder)
    return {"source": str(folder)}


def settings(base: dict, photos: Path, method: dict, **sections: dict) -> dict:
    return {
        "base": base,
        "data": {"photos": str(photos), "class_noun": "mug", "token": "zwx", "crop": "random", "crops": 2},
        "method": method,
        "optim": {"kind": "adamw", "lr": 1e-3},
        "run": {"steps": 4, "checkpoint_every": 2, "batch_size": 2},
        "sample": {"count": 1, "steps": 1, "prompts": ["a photo of {token} {noun}"]},
        "export": {"dtype": "fp32"},
    } | sections


@every_case
@pytest.mark.slow
def test_it_trains_stops_goes_on_and_leaves(
    name: str, kind: str, wide: bool, method: dict, tiny_bases: dict[str, Path], pairs: Path, tmp_path: Path
) -> None:
    few = ["data.mask_count=3"] if kind == "inpaint" else []
    recipe = parse_recipe(settings(base_of(name, kind, wide, tiny_bases, tmp_path / "base"), pairs, method), few)
    whole = resumed_is_the_unbroken_run(recipe, tmp_path)
    exported = json.loads((whole / "exports.json").read_text())
    assert all(check.startswith("ok: ") for item in exported for check in item["checks"])
    if method is FULL:
        check_folder(name, kind, whole / "exports" / "run-model", weights(whole))
    else:
        check_keys(whole / "exports" / "run.safetensors", tiny_bases[name], pairs, tmp_path)


def check_folder(name: str, kind: str, folder: Path, trained: dict[str, torch.Tensor]) -> None:
    """The new weights have learned from the extra input; our reader and diffusers' both read the folder."""
    new = trained["denoiser.conv_in.weight"][:, 4:]
    assert new.abs().amin((0, 2, 3)).gt(0).all()
    family = load_family(str(folder))
    assert (family.name, family.inputs, family.widened) == (name, kind, False)
    pipeline = getattr(diffusers, family.pipelines[kind]).from_pretrained(folder)
    assert torch.equal(pipeline.unet.conv_in.weight, trained["denoiser.conv_in.weight"])


def check_keys(file: Path, plain: Path, photos: Path, tmp_path: Path) -> None:
    """A LoRA's keys are those of the plain family."""
    recipe = parse_recipe(settings({"source": str(plain)}, photos, LORA, run={"steps": 1}))
    run = job.train(recipe, tmp_path / "plain")
    assert load_file(file).keys() == load_file(run / "exports" / "run.safetensors").keys()


@pytest.mark.parametrize("kind", ["inpaint", "depth", "edit"])
@pytest.mark.slow
def test_the_extra_input_decides_the_loss(
    kind: str, tiny_bases: dict[str, Path], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same run with the extra inputs zeroed has another first loss, where the base heeds them."""
    from finetune.data.batches import Batches

    base = base_of("sd1", kind, False, tiny_bases, tmp_path / "base")
    recipe = parse_recipe(settings(base, pairs, LORA, run={"steps": 1}))
    seeing = job.train(recipe, tmp_path / "seeing")
    monkeypatch.setattr(Batches, "_extra", lambda self, drawn: None)
    blind = job.train(recipe, tmp_path / "blind")
    losses = [json.loads((run / "metrics.jsonl").read_text())["loss"] for run in (seeing, blind)]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_a_depth_export_keeps_the_estimator(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """A model that makes depth maps lies in the base's folder; what is exported has it too."""
    from finetune.export.model.model_folder import export_folder

    base_of("sd2", "depth", False, tiny_bases, tmp_path / "base")
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    listed = {"depth_estimator": ["transformers", "DPTForDepthEstimation"]}
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index | listed))
    (tmp_path / "base" / "depth_estimator").mkdir()
    (tmp_path / "base" / "depth_estimator" / "config.json").write_text("{}")
    assert export_folder(load_family(str(tmp_path / "base")), tmp_path / "out", "fp32").ok
    again = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert again["depth_estimator"] == listed["depth_estimator"]
    assert (tmp_path / "out" / "depth_estimator" / "config.json").is_file()


def test_class_images_are_painted_over_too(tiny_bases: dict[str, Path], pairs: Path, tmp_path: Path) -> None:
    base = {"source": str(tiny_bases["sd1"]), "inputs": "inpaint"}
    prior = {"kind": "class_images", "count": 2, "steps": 1}
    run = job.train(parse_recipe(settings(base, pairs, FULL, prior=prior, run={"steps": 1})), tmp_path / "run")
    assert (run / "report.html").is_file()


CLASS_IMAGES = {"prior": {"kind": "class_images"}}


@pytest.mark.parametrize(
    ("name", "kind", "method", "more", "said"),
    [
        ("sd1", "inpaint", LORA, {}, "only method.kind=full"),
        ("sd1", "inpaint", FULL | {"parts": ["text_encoders"]}, {}, "only method.kind=full"),
        ("sd2", "depth", FULL, CLASS_IMAGES, "class images do not have"),
        ("sd1", "edit", FULL, CLASS_IMAGES, "class images do not have"),
        ("sd1", "edit", FULL, {"export": {"formats": ["checkpoint"]}}, "export.formats has 'checkpoint'"),
        ("sdxl", "depth", FULL, {}, "base.inputs is 'depth'"),
        ("flux", "edit", FULL, {}, "base.inputs is 'edit'"),
    ],
)
def test_what_can_not_be_is_refused(
    name: str, kind: str, method: dict, more: dict, said: str, tiny_bases: dict[str, Path], pairs: Path
) -> None:
    base = {"source": str(tiny_bases[name]), "inputs": kind}
    with pytest.raises(BadInput, match=said) as caught:
        prepare(parse_recipe(settings(base, pairs, method, **more)))
    assert "\n" not in str(caught.value)


def test_missing_depth_maps_are_named(tiny_bases: dict[str, Path], photos: Path) -> None:
    base = {"source": str(tiny_bases["sd2"]), "inputs": "depth"}
    with pytest.raises(BadInput, match=r"no depth image for 0\.png, 1\.png, 2\.png"):
        prepare(parse_recipe(settings(base, photos, FULL)))


def test_the_recipe_refuses_what_is_no_input() -> None:
    plain = {"data": {"photos": "x", "class_noun": "dog"}, "method": LORA, "optim": {"kind": "adamw"}}
    with pytest.raises(BadInput, match=r"base\.inputs is 'outpaint'"):
        parse_recipe(plain | {"base": {"source": "tiny", "inputs": "outpaint"}})

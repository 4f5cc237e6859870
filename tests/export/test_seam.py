"""One registry for LoRA files, whole models and embeddings: a format from outside leaves a run as ours do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import FULL, LORA, settings

from finetune.config.load import parse_recipe
from finetune.core.errors import BadInput
from finetune.core.files import load_tensors, save_tensors
from finetune.core.records import Check
from finetune.export.base import Adapter, AdapterExport, Exported, ModelExport, Request
from finetune.export.registry import EXPORTS, check_formats, formats_for
from finetune.export.settings import Verify
from finetune.families.base import Family
from finetune.families.settings import Base
from finetune.jobs import train as job
from finetune.jobs.estimate import report


class Plain(AdapterExport):
    """A and B by number, what they are of in the header."""

    name = "a-plain"  # before ours: what is shown after the training is read from this file
    read_by = ()

    def path(self, folder: Path, name: str, family: str) -> Path:
        return folder / f"{name}-plain.safetensors"

    def write(self, adapter: Adapter, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
        tensors, places = {}, []
        for number, (part, module, a, b) in enumerate(adapter.modules()):
            tensors |= {f"{number}.a": a.to(dtype).contiguous(), f"{number}.b": (b * adapter.scale).to(dtype)}
            places.append(f"{part} {module}")
        save_tensors(path, tensors, {"places": json.dumps(places)})

    def read(self, path: Path, family: str, base_folder: Path) -> Adapter:
        from safetensors import safe_open

        with safe_open(path, "pt") as held:
            places = json.loads(held.metadata()["places"])
        tensors = load_tensors(path)
        layers: dict[str, dict] = {}
        for number, (part, module) in enumerate(place.split(" ") for place in places):
            layers.setdefault(part, {})[module] = (tensors[f"{number}.a"].float(), tensors[f"{number}.b"].float())
        return Adapter(family, base_folder, layers, 1.0)


class Flat(ModelExport):
    """All weights of all parts in one file."""

    name = "flat"
    usual = False

    def path(self, folder: Path, name: str, family: str) -> Path:
        return folder / f"{name}-flat.safetensors"

    def obstacle(self, family: Family) -> str:
        return "a base with another reader" if family.inputs else ""

    def export(self, family: Family, path: Path, request: Request, verify: Verify) -> Exported:
        wanted = {
            f"{part}.{name}": value for part, m in family.parts.items() for name, value in m.state_dict().items()
        }
        save_tensors(path, {name: value.contiguous() for name, value in wanted.items()}, {})
        same = all(torch.equal(value, wanted[name]) for name, value in load_tensors(path).items())
        return Exported(self.name, path, path.stat().st_size, len(wanted), 0.0, [], [Check("weights", same, "read")])

    def open(self, path: Path, base: Base, dtype: torch.dtype) -> Family:
        family, held = base.load(dtype), load_tensors(path)
        for part, module in family.parts.items():
            of = {name.removeprefix(f"{part}."): v for name, v in held.items() if name.startswith(f"{part}.")}
            module.load_state_dict(of)
        return family

    def checking(self, parts: Mapping[str, float], verify: Verify) -> str:
        return f"{len(parts)} parts at once"


@pytest.fixture(autouse=True)
def _outside() -> Iterator[None]:
    for entry in (Plain, Flat):
        EXPORTS.register(entry)
    try:
        yield
    finally:
        for name in (Plain.name, Flat.name):
            del EXPORTS._found[name]


def test_each_kind_has_its_formats() -> None:
    assert formats_for(["adapter"]) == ["a-plain", "diffusers", "kohya", "peft"]
    assert formats_for(["weights"]) == ["folder", "checkpoint", "flat", *formats_for(["adapter"])]
    assert formats_for(["weights"], usual=True) == ["folder"]
    assert formats_for(["embedding"]) == ["embedding"]


@pytest.mark.parametrize(
    ("wanted", "held", "said"),
    [
        ("embedding", "adapter", "an embedding file can't hold an adapter"),
        ("flat", "adapter", "a flat file can't hold an adapter"),
        ("kohja", "adapter", "did you mean 'kohya'"),
        ("flat", "embedding", "a flat file can't hold new embeddings, which this run trains: use embedding"),
    ],
)
def test_what_can_not_hold_it_is_refused(wanted: str, held: str, said: str) -> None:
    with pytest.raises(BadInput) as raised:
        check_formats([wanted], [held])
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("method", "formats"), [(LORA, ["a-plain", "kohya"]), (FULL, ["flat", "folder"])], ids=["lora", "full"]
)
@pytest.mark.slow
def test_a_run_leaves_by_a_format_from_outside(
    method: dict, formats: list[str], tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """Written, checked, listed, and read again for the pictures after the training: those of our own format."""
    pages = []
    for order in (formats, formats[::-1]):
        export = {"formats": order, "dtype": "fp32"}
        own = {"export": export, "prior": {"kind": "none"}, "optim": {"kind": "adamw", "lr": 0.02}}
        recipe = parse_recipe(settings(tiny_bases["sd1"], photos, method, **own))
        run = job.train(recipe, tmp_path / order[0], lambda line: None)
        listed = json.loads((run / "exports.json").read_text())
        assert {item["format"] for item in listed} == set(order)
        assert all(check.startswith("ok: ") for item in listed for check in item["checks"])
        files = sorted((run / "samples" / "after").glob("*.png"))
        pages.append(np.stack([np.asarray(Image.open(file), dtype=np.int16) for file in files]))
    assert abs(pages[0] - pages[1]).max() <= 1  # of 255
    before = sorted((run / "samples" / "before").glob("*.png"))
    assert abs(pages[0] - np.stack([np.asarray(Image.open(f), dtype=np.int16) for f in before])).max() > 9


def test_the_plan_counts_what_its_check_holds(tiny_bases: dict[str, Path], photos: Path) -> None:
    values = settings(tiny_bases["sd1"], photos, FULL, export={"formats": ["flat"]})
    assert report(parse_recipe(values))["checks"] == "3 parts at once"

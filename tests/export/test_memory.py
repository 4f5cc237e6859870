"""A whole model is compared with a base, or with what was written, without a second model in memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_export import NAMES, bench_of

from finetune.adapters.operations import extracted
from finetune.export.base import Adapter
from finetune.export.decompose import Difference, unloaded_base
from finetune.export.model.model_folder import export_folder
from finetune.export.svd import reduced
from finetune.families import parts as family_parts
from finetune.families.base import Family
from finetune.families.source import load_family
from finetune.methods.full import Full

PARTS = ["denoiser", "text_encoders"]


class Loads:
    """Which parts were read from disk, and how many of them were in memory at once."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.alive: list[weakref.ref] = []
        self.most = 0

    def read(self, name: str, part: Any) -> Any:
        gc.collect()
        self.names.append(name)
        self.alive.append(weakref.ref(part))
        self.most = max(self.most, sum(ref() is not None for ref in self.alive))
        return part


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Loads]:
    """Counting begins when it is called: of every family, whatever reads a part."""

    def begin() -> Loads:
        seen, real = Loads(), family_parts.load_weights
        monkeypatch.setattr(family_parts, "load_weights", lambda path, *how: seen.read(path.name, real(path, *how)))
        return seen

    return begin


def folders(family: Family) -> list[str]:
    return sorted(family.sources[part].folder for part in family.parts)


def moved(base: Path) -> tuple[Full, Family]:
    """A fully trained family, whose weights were moved at random."""
    method, family = Full(parts=PARTS), load_family(str(base))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in method.attach(family, 0).values():
            value.add_(0.01 * torch.randn(value.shape, generator=generator))
    return method, family


def deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {f"{part} {module}": b.flatten(1) @ a.flatten(1) for part, module, a, b in adapter.modules()}


@pytest.mark.parametrize("name", NAMES)
def test_a_full_run_as_a_lora_reads_the_base_part_by_part(
    name: str, tiny_bases: dict[str, Path], loads: Callable[[], Loads]
) -> None:
    method, family = moved(tiny_bases[name])
    seen = loads()
    own = reduced(method, family, bench_of(tiny_bases[name]), 1000, 1.0)
    assert sorted(seen.names) == folders(family)  # each part once
    assert seen.most == 1
    base, found = load_family(str(tiny_bases[name])), deltas(own.adapter)
    for place, delta in found.items():
        part, module = place.split(" ")
        old, new = (
            next(
                value
                for path, value in held.parts[part].named_parameters()
                if path.removeprefix("text_model.") == f"{module}.weight"
            )
            for held in (base, family)
        )
        assert torch.allclose(delta, (new - old).detach().flatten(1), atol=1e-5), place


def test_what_no_lora_holds_is_counted_on_the_way(tiny_bases: dict[str, Path], loads: Callable[[], Loads]) -> None:
    """Against the sum over two whole models."""
    _, family = moved(tiny_bases["sd1"])
    base, change, count = load_family(str(tiny_bases["sd1"])), 0.0, 0
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    for part in family.parts:
        held = {f"{path}.weight" for path, child in base.parts[part].named_modules() if isinstance(child, kinds)}
        theirs = dict(base.parts[part].named_parameters())
        for path, value in family.parts[part].named_parameters():
            if path not in held and not torch.equal(value, theirs[path]):
                count, change = count + 1, change + float((value - theirs[path]).double().square().sum())
    seen = loads()
    difference = Difference(unloaded_base(family, torch.float32), family)
    for _ in difference.layers():
        assert seen.most == 1
    assert difference.beyond_lora == (count, pytest.approx(change**0.5))


@pytest.mark.parametrize("name", NAMES)
def test_a_written_folder_is_read_part_by_part(
    name: str, tiny_bases: dict[str, Path], tmp_path: Path, loads: Callable[[], Loads]
) -> None:
    _, family = moved(tiny_bases[name])
    seen = loads()
    item = export_folder(family, tmp_path / "model", "fp32")
    assert item.ok, item.checks
    assert sorted(seen.names) == folders(family)
    assert seen.most == 1


def test_extracting_reads_one_part_of_each_model(
    tiny_bases: dict[str, Path], tmp_path: Path, loads: Callable[[], Loads]
) -> None:
    _, family = moved(tiny_bases["sd1"])
    export_folder(family, tmp_path / "model", "fp32")
    seen = loads()
    adapter, kept = extracted(str(tmp_path / "model"), str(tiny_bases["sd1"]), 1000)
    assert kept.error < 1e-5
    assert deltas(adapter)
    assert seen.most == 2  # one of each
    assert sorted(seen.names) == sorted(2 * folders(family))


def test_a_changed_tokenizer_is_found(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    from finetune.export.model.model_folder import _compare

    family = load_family(str(tiny_bases["sd1"]))
    assert export_folder(family, tmp_path / "model", "fp32").ok
    file = tmp_path / "model" / "tokenizer" / "merges.txt"
    file.write_text(file.read_text() + "z z\n")
    _, check = _compare(family, tmp_path / "model", torch.float32, "full")
    assert not check.passed
    assert "merges.txt" in check.message

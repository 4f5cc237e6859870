"""All formats are checked on one clean base: it stays clean, and faults in any format are found on it as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_export import ABOUT, bench_of, trained

from finetune.export.adapter import adapter_from, export_adapter
from finetune.export.base import Request
from finetune.export.bench import Bench
from finetune.export.registry import EXPORTS
from finetune.export.verify import apply_adapter, merged, probe, verify
from finetune.families.base import Family
from finetune.families.source import load_family

READ_BY_DIFFUSERS = ["kohya", "diffusers"]


def counted(bench: Bench) -> tuple[Bench, list[torch.dtype]]:
    """A bench that notes every base that it loads."""
    loads: list[torch.dtype] = []
    return Bench(bench.device, bench.dtype, lambda dtype: loads.append(dtype) or bench.load(dtype)), loads  # type: ignore[func-returns-value]


def same_weights(one: Family, other: Family) -> bool:
    states = [{part: module.state_dict() for part, module in family.parts.items()} for family in (one, other)]
    return all(
        states[0][part].keys() == states[1][part].keys()
        and all(torch.equal(value, states[1][part][name]) for name, value in states[0][part].items())
        for part in states[0]
    )


def rename(tensors: dict[str, Any]) -> None:
    for key in [key for key in tensors if "mid_block" in key and "to_q" in key]:
        tensors[key.replace("mid_block", "mid_blocks")] = tensors.pop(key)


def scale(tensors: dict[str, Any]) -> None:
    """One module by 1 %."""
    key = next(key for key in tensors if "to_q" in key and ("lora_up" in key or "lora_B" in key))
    tensors[key] = tensors[key] * 1.01


def sign(tensors: dict[str, Any]) -> None:
    key = next(key for key in tensors if "to_k" in key and ("lora_up" in key or "lora_B" in key))
    tensors[key] = -tensors[key]


@pytest.mark.parametrize("fault", [rename, scale, sign])
def test_faults_in_every_format_are_found_on_the_lent_base(
    fault: Any, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    """A sound file before and after each faulty one: neither does a fault stay, nor does a sound file hide one."""
    adapter = adapter_from(*trained(tiny_bases["sd1"], alpha=7))
    bench, loads = counted(bench_of(tiny_bases["sd1"]))
    for name in READ_BY_DIFFUSERS:
        (item,) = export_adapter(adapter, Request(tmp_path, "x", "fp32", ABOUT), [name], bench)
        assert item.ok, item.checks
        whole, broken = item.path.read_bytes(), load_file(item.path)
        with safe_open(item.path, "pt") as opened:
            header = opened.metadata()
        fault(broken)
        save_file(broken, item.path, header)
        assert not verify(adapter, EXPORTS[name](), item.path, torch.float32, bench).ok
        check = reads(adapter, item.path, bench)
        assert not check.passed, check
        item.path.write_bytes(whole)
        assert reads(adapter, item.path, bench).passed
    assert len(loads) == 1
    with bench.lent() as family:
        assert same_weights(family, load_family(str(tiny_bases["sd1"])))
    bench.close()


def reads(adapter: Any, path: Path, bench: Bench) -> Any:
    """Diffusers' reader alone: what it makes of the file, without the comparison of the matrices before it."""
    from finetune.export.verify import read_by_diffusers

    return read_by_diffusers(adapter, adapter, path, torch.float32, bench)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3"])
def test_a_merge_for_a_block_is_the_merge(name: str, tiny_bases: dict[str, Path]) -> None:
    """The same prediction bit for bit, and afterwards the base's own."""
    adapter = adapter_from(*trained(tiny_bases[name], targets="conv" if name != "sd3" else "attention", alpha=7))
    family, other = (load_family(str(tiny_bases[name])) for _ in range(2))
    apply_adapter(other, adapter)
    with torch.no_grad():
        before = probe(family)
        with merged(family, adapter):
            inside = probe(family)
        assert torch.equal(inside, probe(other))
        assert not torch.equal(inside, before)
        assert torch.equal(probe(family), before)
    assert same_weights(family, load_family(str(tiny_bases[name])))


def test_predictions_are_counted_and_small(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clean base's once; with diffusers' reader and with our merge once for each format. At most 32x32 latents."""
    adapter = adapter_from(*trained(tiny_bases["sd1"], alpha=7))
    bench, loads = counted(bench_of(tiny_bases["sd1"]))
    with bench.lent() as family:
        family.resolution = 512  # 256x256 latents of this base
    shapes, kind = [], type(family)
    real = kind.predict
    monkeypatch.setattr(
        kind, "predict", lambda own, noisy, *rest: shapes.append(noisy.shape) or real(own, noisy, *rest)
    )
    items = export_adapter(adapter, Request(tmp_path, "x", "fp32", ABOUT), [*READ_BY_DIFFUSERS, "peft"], bench)
    assert all(item.ok for item in items)
    assert len(shapes) == 1 + 2 * len(READ_BY_DIFFUSERS)
    assert {tuple(shape) for shape in shapes} == {(1, 4, 32, 32)}
    assert len(loads) == 1
    bench.close()


def test_a_base_that_was_changed_is_not_lent_again(tiny_bases: dict[str, Path]) -> None:
    """Whoever forgets to undo costs a load, and no wrong check."""
    bench, loads = counted(bench_of(tiny_bases["sd1"]))
    with bench.lent() as family, torch.no_grad():
        next(family.parts["denoiser"].parameters()).add_(1)
    with bench.lent() as family:
        assert same_weights(family, load_family(str(tiny_bases["sd1"])))
    with pytest.raises(ZeroDivisionError), bench.lent():
        _ = 1 / 0
    with bench.lent() as family:
        held = family
    assert bench.take() is held
    assert len(loads) == 3
    bench.take()
    assert len(loads) == 4

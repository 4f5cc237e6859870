"""A trained LoRA as plain matrices, written in the formats that were asked for."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from finetune.core.devices import DTYPES
from finetune.core.errors import BadInput
from finetune.export.base import Adapter, Bench, Exported
from finetune.export.metadata import adapter_metadata
from finetune.export.registry import EXPORTS, check_formats
from finetune.export.verify import verify
from finetune.families.base import Family
from finetune.methods.base import Method
from finetune.methods.lora import LoRA


def adapter_from(method: Method, family: Family) -> Adapter:
    """The trained LoRA as plain matrices."""
    assert isinstance(method, LoRA), f"{method.kind} has no low-rank matrices"
    state = method.state_dict(family)
    layers: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for key, a in state.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            part, module = name.split(".", 1)
            layers.setdefault(part, {})[module] = (a.float().cpu(), state[f"{name}.lora_B.weight"].float().cpu())
    divisor = method.rank**0.5 if method.rank_stabilised else method.rank
    return Adapter(family.name, family.folder, layers, method.alpha_value / divisor)


def export_adapter(
    adapter: Adapter,
    folder: Path,
    name: str,
    formats: Sequence[str],
    dtype: str,
    about: dict[str, str],
    bench: Bench,
    v_prediction: bool = False,
    force: bool = False,
) -> list[Exported]:
    """Writes each format, and checks it on `bench`.

    Raises:
        BadInput: an unknown format, or a file that is already there without `force`.
    """
    check_formats(formats)
    exported = []
    written = adapter.balanced() if dtype == "fp16" else adapter
    for wanted in formats:
        export = EXPORTS[wanted]()
        path = export.path(folder, name, adapter.family)
        if path.exists() and not force:
            raise BadInput(f"{path} is already there: remove it, or pass --force")
        if path.is_dir():
            shutil.rmtree(path)
        export.write(written, path, DTYPES[dtype], adapter_metadata(adapter, about, v_prediction))
        exported.append(verify(adapter, export, path, DTYPES[dtype], bench))
    return exported

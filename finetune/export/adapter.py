"""Writes a trained LoRA in the requested formats."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from finetune.core.devices import DTYPES
from finetune.core.errors import BadInput
from finetune.core.events import one_step
from finetune.export.base import Adapter, Exported, Request
from finetune.export.bench import Bench
from finetune.export.metadata import adapter_metadata
from finetune.export.registry import adapter_exports, check_formats
from finetune.export.verify import verify
from finetune.families.base import Family
from finetune.methods.base import Method


def adapter_from(method: Method, family: Family) -> Adapter:
    """The trained LoRA of a `low_rank` method as plain fp32 matrices."""
    state = method.state_dict(family)
    layers: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for key, a in state.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            part, module = name.split(".", 1)
            layers.setdefault(part, {})[module] = (a.float().cpu(), state[f"{name}.lora_B.weight"].float().cpu())
    return Adapter(family.name, family.folder, layers, method.scale)


def export_adapter(
    adapter: Adapter, request: Request, formats: Sequence[str], bench: Bench, file: Path | None = None
) -> list[Exported]:
    """Writes each format, and checks it on `bench`. `file`: the path in place of the one that the format chooses.

    Raises:
        BadInput: a format is unknown, or a file already exists and `request.force` is not set.
    """
    check_formats(formats)
    exported = []
    written = adapter.balanced() if request.dtype == "fp16" else adapter
    dtype, metadata = DTYPES[request.dtype], adapter_metadata(adapter, request.about, request.v_prediction)
    for wanted in formats:
        export = adapter_exports([wanted])[0]
        path = file or export.path(request.folder, request.name, adapter.family)
        if path.exists() and not request.force:
            raise BadInput(f"{path} already exists: remove it, or pass --force")
        if path.is_dir():
            shutil.rmtree(path)
        with one_step(f"Export {wanted}"):
            export.write(written, path, dtype, metadata)
        with one_step(f"Check {wanted}"):
            exported.append(verify(adapter, export, path, dtype, bench))
    return exported

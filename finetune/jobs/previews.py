"""Previews use an exported file: the adapter is written as for an export, read back, and used for drawing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from finetune.core.devices import DTYPES
from finetune.export.adapter import adapter_from
from finetune.export.base import Adapter, pad_rank
from finetune.export.metadata import adapter_metadata
from finetune.export.registry import adapter_exports
from finetune.families.base import Family
from finetune.runs.about import about_run
from finetune.runs.folder import RunFolder


@contextmanager
def from_file(folder: RunFolder, family: Family, step: int) -> Iterator[None]:
    """Writes the LoRA of this step to RUN/previews/NAME-000100.safetensors, and uses that file's weights in the block.

    Afterwards the family holds exactly the weights from before. A method other than LoRA is left as it is, and no file
    is written: the conversion would need an SVD of every module.

    Raises:
        OSError: the file can't be written.
    """
    method = folder.recipe.method.adapter
    if not method.low_rank:
        yield
        return
    kept, trained = method.state_dict(family), adapter_from(method, family)
    method.load_state_dict(family, _state(_written(folder, family, trained, step), trained))
    try:
        yield
    finally:
        method.load_state_dict(family, kept)


def _written(folder: RunFolder, family: Family, adapter: Adapter, step: int) -> Adapter:
    """Writes the adapter of this step in a format for UIs, and reads it back."""
    recipe = folder.recipe
    export = adapter_exports([family.naming.ui_format])[0]
    path = folder.path / "previews" / f"{recipe.run.name}-{step:06d}.safetensors"
    about = about_run(folder) | {"title": path.stem, "steps": str(step)}
    v_prediction = family.schedule.prediction == "v_prediction"
    stored = adapter.balanced() if recipe.export.dtype == "fp16" else adapter
    export.write(stored, path, DTYPES[recipe.export.dtype], adapter_metadata(adapter, about, v_prediction))
    return export.read(path, family.name, family.folder)


def _state(adapter: Adapter, trained: Adapter) -> dict[str, Tensor]:
    """The matrices of a file as state of the method, which multiplies them by its own scale."""
    state: dict[str, Tensor] = {}
    for part, module, a, b in trained.modules():
        name, held = f"{part}.{module}", adapter.layers.get(part, {}).get(module)
        found_a, found_b = held if held is not None else (a[:0], b[:, :0])
        found_b = found_b * (adapter.scale / trained.scale)
        # a joined matrix does not say which module a column of zeros belongs to, so some may be gone
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = pad_rank(found_a, found_b, len(a))
    return state

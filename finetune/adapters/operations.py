"""Verifies, converts, merges and resizes adapter files of any trainer, and extracts adapters from tuned models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from finetune.adapters.algebra import combine, extract, resize
from finetune.adapters.inspection import Inspection, inspect_adapter, open_adapter
from finetune.core.devices import DTYPES, machine
from finetune.core.errors import BadInput
from finetune.export.adapter import export_adapter
from finetune.export.base import Adapter, Bench, Exported, Request
from finetune.export.decompose import Kept, unloaded
from finetune.export.registry import EXPORTS, check_formats, model_exports
from finetune.export.verify import BOUNDS, apply_adapter, read_by_diffusers
from finetune.families.configs import read_config
from finetune.families.registry import family_of
from finetune.families.source import load_family, resolve_base

# diffusers raises these on files that it can't read
READER_ERRORS = (ValueError, KeyError, RuntimeError, IndexError, AttributeError, TypeError)


def verify_file(path: Path, base: str) -> Inspection:
    """Runs `inspect_adapter`, and adds a verdict for diffusers, which loads the file into a clean base."""
    found = inspect_adapter(path, base)
    if path.is_dir():
        found.verdicts["diffusers"] = ("unknown", "it reads such folders part by part through PEFT: not tried here")
        return found
    if found.adapter is None:
        found.verdicts["diffusers"] = ("refused", "nothing fits")
        return found
    try:
        check = read_by_diffusers(found.adapter, found.adapter, path, _coarsest(found.dtypes), _bench(found.adapter))
    except AssertionError:  # diffusers' reader of joined matrices only accepts the sizes of the real Flux.1
        found.verdicts["diffusers"] = ("unknown", "its reader of such keys only accepts the full-size model")
        return found
    except READER_ERRORS as error:
        found.verdicts["diffusers"] = ("refused", " ".join(str(error).split())[:160])
        return found
    found.verdicts["diffusers"] = ("fully" if check.passed else "partly", check.message)
    return found


def _bench(adapter: Adapter) -> Bench:
    return Bench(*machine(), lambda dtype: load_family(str(adapter.base_folder), dtype=dtype))


def _coarsest(found: Sequence[str]) -> torch.dtype:
    """The file's precision with the largest rounding error."""
    return max((DTYPES[name] for name in found if name in DTYPES), key=lambda dtype: BOUNDS[dtype])


def write(
    adapter: Adapter, out: Path, formats: Sequence[str], dtype: str, force: bool, about: dict[str, str]
) -> list[Exported]:
    """Writes the adapter in each format and checks it. `out` is a path without ending; each format adds its own.

    Raises:
        BadInput: a format is unknown, or a file already exists and `force` is not set.
    """
    scheduler = read_config(adapter.base_folder, "scheduler/scheduler_config.json")
    folder = out.parent
    for wanted in formats:
        check_formats([wanted])
        path = EXPORTS[wanted]().path(folder, out.name, adapter.family)
        if path.exists() and not force:
            raise BadInput(f"{path} already exists: give another --out, or pass --force")
    own = {"title": out.name, "trigger_phrase": "", "resolution": ""} | about
    v_prediction = scheduler.get("prediction_type") == "v_prediction"
    request = Request(folder, out.name, dtype, own, v_prediction, force=True)
    return export_adapter(adapter, request, list(formats), _bench(adapter))


def about_of(found: Inspection) -> dict[str, str]:
    """The metadata that a converted file keeps: the trigger and the resolution, nothing private."""
    metadata = found.metadata
    return {
        "trigger_phrase": metadata.get("modelspec.trigger_phrase", ""),
        "resolution": metadata.get("modelspec.resolution", ""),
    }


def weighted(text: str) -> tuple[Path, float]:
    """Parses FILE or FILE:WEIGHT; the default weight is 1.

    Raises:
        BadInput: there is no such file, and the text after the colon is not a number.
    """
    name, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(name), float(number)
    except ValueError as error:
        raise BadInput(f"there is no file {text!r}, and {number!r} is not a weight: write FILE or FILE:0.7") from error


def merged(files: Sequence[tuple[Path, float]], base: str, rank: int | None) -> tuple[Adapter, Kept | None]:
    """The weighted sum of adapters as one adapter, reduced to `rank` if given, and how much of the sum it keeps (None
    if nothing was reduced)."""
    adapter = combine([(open_adapter(path, base)[0], weight) for path, weight in files])
    return resize(adapter, rank) if rank else (adapter, None)


def merged_model(
    files: Sequence[tuple[Path, float]], base: str, out: Path, dtype: str, wanted: str = "folder"
) -> Exported:
    """Writes the base with adapters added to its weights, as a diffusers folder or a single file.

    Raises:
        BadInput: `out` already exists, or an adapter can't be read without loss.
    """
    if out.exists():
        raise BadInput(f"{out} already exists: give another --out")
    adapters = [(open_adapter(path, base)[0], weight) for path, weight in files]
    family = load_family(base)
    for adapter, weight in adapters:
        apply_adapter(family, adapter, weight)
    about = {"title": out.stem, "trigger_phrase": "", "resolution": f"{family.resolution}x{family.resolution}"}
    request = Request(out.parent, out.stem, dtype, about)
    return model_exports([wanted])[0].export(family, out, request, "full")


def extracted(model: str, base: str, rank: int) -> tuple[Adapter, Kept]:
    """A tuned model's difference from its base as a LoRA. Only one part of each model is in memory at a time."""
    old, new = (resolve_base(source) for source in (base, model))
    unread, tuned = (unloaded(family_of(folder), folder, torch.float32) for folder in (old, new))
    return extract(unread, tuned, rank)

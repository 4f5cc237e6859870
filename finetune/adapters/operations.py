"""Verifies, converts, merges and resizes adapter files of any trainer, and extracts adapters from tuned models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from finetune.adapters.algebra import combine, extract, resize
from finetune.adapters.bases import BASE_HASH, has_weights
from finetune.adapters.faults import STATES, with_faults
from finetune.adapters.header import predicts_v
from finetune.adapters.inspection import inspect_adapter, open_adapter
from finetune.adapters.keys import is_lora
from finetune.adapters.result import Inspection
from finetune.adapters.targets import Target, paths_of, target_of
from finetune.core.devices import DTYPES, machine
from finetune.core.errors import BadInput
from finetune.export.adapter import export_adapter
from finetune.export.base import Adapter, Exported, Request
from finetune.export.bench import Bench
from finetune.export.decompose import Kept, unloaded
from finetune.export.lora.kohya import NEEDS_OUT_PROJ, keys_of, lacks_out_proj
from finetune.export.registry import model_exports
from finetune.export.verify import BOUNDS, apply_adapter, read_by_diffusers
from finetune.families.configs import read_config
from finetune.families.registry import family_of
from finetune.families.source import load_family, resolve_base

# diffusers raises these on files that it can't read
READER_ERRORS = (ValueError, KeyError, RuntimeError, IndexError, AttributeError, TypeError)
LARGEST_FP16 = 65504.0


def verify_file(path: Path, base: str | None = None) -> Inspection:
    """Runs `inspect_adapter`, and adds a verdict for diffusers, which loads the file into a clean base if there is one
    with weights."""
    found = inspect_adapter(path, base)
    if found.native:
        return found
    state, why = _read_by_diffusers(found)
    felt = with_faults({"diffusers": (state, why)}, found.by_name, found.header_scale)["diffusers"]
    tried = state in ("partly", "refused")  # what the loader did counts more than what is known of it
    found.verdicts["diffusers"] = (state, why) if tried and STATES.index(state) <= STATES.index(felt[0]) else felt
    return found


def _read_by_diffusers(found: Inspection) -> tuple[str, str]:
    """What diffusers' own loader does with the file: ("fully", "partly", "refused" or "unknown"; the reason)."""
    if found.kind == "peft":
        return "unknown", "it reads such folders part by part through PEFT: not tried here"
    if found.adapter is None or "another-base" in found.faults:
        return "unknown", "not tried"
    if not found.compared.weights:
        return "unknown", "not tried: give --base, and it loads the file"
    adapter, bench = found.adapter, _bench(found.adapter)
    try:
        check = read_by_diffusers(adapter, adapter, found.path, _coarsest(found.dtypes), bench)
    except AssertionError:  # diffusers' reader of joined matrices only accepts the sizes of the real Flux.1
        return "unknown", "its reader of such keys only accepts the full-size model"
    except READER_ERRORS as error:
        return "refused", _reason(found, " ".join(str(error).split())[:160])
    finally:
        bench.close()
    return ("fully", check.message) if check.passed else ("partly", _reason(found, check.message))


def _reason(found: Inspection, said: str) -> str:
    """Why diffusers does not read a file: what is known of it, or what its loader said."""
    known = found.kind == "kohya" and found.adapter is not None and lacks_out_proj(found.adapter)
    return NEEDS_OUT_PROJ if known else said


def _bench(adapter: Adapter, weights: bool = True) -> Bench:
    """Without the base's weights, written files are read again and compared, and not loaded by diffusers."""
    folder = str(adapter.base_folder)
    return Bench(*machine(), lambda dtype: load_family(folder, dtype=dtype), "full" if weights else "deltas")


def _coarsest(found: Sequence[str]) -> torch.dtype:
    """The file's precision with the largest rounding error."""
    return max((DTYPES[name] for name in found if name in DTYPES), key=lambda dtype: BOUNDS[dtype])


def write(
    adapter: Adapter, out: Path | Target, formats: Sequence[str], dtype: str, force: bool, about: dict[str, str]
) -> list[Exported]:
    """Writes the adapter in each format and checks it. `out` is a target, or a path as `target_of` reads it.

    Raises:
        BadInput: a format is unknown, a file already exists and `force` is not set, or `dtype` can't hold the values.
            Nothing is written then.
    """
    target = out if isinstance(out, Target) else target_of(out, adapter.family)
    formats = list(dict.fromkeys(formats))
    paths = paths_of(target, formats, adapter.family)
    for path in paths.values():
        if path.exists() and not force:
            raise BadInput(f"{path} already exists: give another --out, or pass --force")
        if path.is_dir() and path == target.file:
            raise BadInput(f"{path} is a folder: give another --out")
    _check_range(adapter, dtype)
    scheduler = read_config(adapter.base_folder, "scheduler/scheduler_config.json")
    own = {"title": target.name, "trigger_phrase": "", "resolution": ""} | about
    v_prediction = own.pop("prediction", "") == "v" or scheduler.get("prediction_type") == "v_prediction"
    request = Request(target.folder, target.name, dtype, own, v_prediction, force=True)
    bench = _bench(adapter, has_weights(adapter.base_folder))
    try:
        return [
            item for wanted, path in paths.items() for item in export_adapter(adapter, request, [wanted], bench, path)
        ]
    finally:
        bench.close()


def _check_range(adapter: Adapter, dtype: str) -> None:
    """Raises BadInput if a matrix has values that `dtype` can't hold."""
    limit = LARGEST_FP16 if dtype == "fp16" else float(torch.finfo(DTYPES[dtype]).max)
    written = adapter.balanced() if dtype == "fp16" else adapter
    for part, module, a, b in written.modules():
        largest = max(float(a.abs().max()), float(b.abs().max()) * max(1.0, abs(adapter.scale)))
        if not largest <= limit:
            advice = "pass --dtype fp32" if dtype != "fp32" else "give smaller weights"
            raise BadInput(f"{part} {module} would hold {largest:.1e}, too large for {dtype}: {advice}")


def about_of(found: Inspection) -> dict[str, str]:
    """The metadata that a converted file keeps: the trigger, the resolution, what the base predicts and the base's
    hash, nothing private."""
    metadata = found.metadata
    return {
        "trigger_phrase": metadata.get("modelspec.trigger_phrase", ""),
        "resolution": metadata.get("modelspec.resolution", ""),
    } | {
        **({"prediction": "v"} if predicts_v(metadata) else {}),
        **({"base_hash": metadata[BASE_HASH]} if BASE_HASH in metadata else {}),
    }


def merged_files(
    files: Sequence[tuple[Path, float]], base: str | None, rank: int | None
) -> tuple[Adapter, Kept | None]:
    """The weighted sum of adapters as one adapter, reduced to `rank` if given, and how much of the sum it keeps (None
    if nothing was reduced).

    Raises:
        BadInput: a file can't be read without loss, or two are for different bases.
    """
    opened = [(*open_adapter(path, base), weight) for path, weight in files]
    (_, first, _), *others = opened
    for _, found, _ in others:
        if found.compared.folder != first.compared.folder:
            raise BadInput(
                f"{first.path} is for {first.compared.words} and {found.path} for {found.compared.words}: merge files "
                "for one base, and name it with --base if these do fit it"
            )
    adapter = combine([(adapter, weight) for adapter, _, weight in opened])
    return resize(adapter, rank) if rank else (adapter, None)


def merged_model(
    files: Sequence[tuple[Path, float]], base: str, out: Path, dtype: str, wanted: str = "folder"
) -> Exported:
    """Writes the base with adapters added to its weights, as a diffusers folder or a single file.

    Raises:
        BadInput: `out` already exists, or an adapter can't be read without loss.
    """
    if out.exists():
        raise BadInput(f"{out} already exists, and a model is not overwritten: give another --out")
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


def refuse_what_is_no_base(source: str) -> None:
    """Raises:
    BadInput: it is a LoRA or a run folder; the message names the command for it.
    """
    path = Path(source).expanduser()
    if (path / "recipe.yaml").is_file():
        raise BadInput(
            f"{source} is a run folder, not a base: use `finetune report {source}`, or `finetune verify` for a file "
            f"in {path / 'exports'}"
        )
    if any(path.glob("*/adapter_config.json")) or (path.is_file() and is_lora(keys_of(path))):
        raise BadInput(f"{source} is a LoRA, not a base: use `finetune verify {source}`")

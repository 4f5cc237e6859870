"""The metadata that exported files carry in their header, which UIs read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime

from safetensors.torch import save
from torch import Tensor

from finetune.core.reading import parse_json
from finetune.export.base import Adapter
from finetune.families.naming.base import Naming
from finetune.families.registry import FAMILIES, denoiser_config

# these have a field of their own in modelspec, or in kohya's header
SPECIFIED = {"title", "resolution", "date", "trigger_phrase", "started", "train_images", "tag_frequency"}
LEGACY = (0x100000, 0x10000)  # kohya's old hash is of these bytes: offset, length


def adapter_metadata(adapter: Adapter, about: dict[str, str], v_prediction: bool) -> dict[str, str]:
    """`ss_*` (Forge, A1111, sdnext), `modelspec.*` 1.0.1 and `finetune_*` strings. Numbers that depend on the file's
    tensors are added by its writer (`with_numbers`).

    `about`: title, resolution ("512x512"), trigger_phrase, and any other facts about the run; among them started (in
    seconds since 1970), train_images and tag_frequency (JSON).
    """
    naming = FAMILIES[adapter.family].naming
    labels = naming.labels
    kohya = {
        "ss_base_model_version": (v_prediction and labels.v_kohya) or labels.kohya,
        "ss_v2": str(labels.v2),
        "ss_network_module": labels.network,
        "ss_output_name": about["title"],
        "ss_resolution": f"({', '.join(about['resolution'].split('x'))})" if about["resolution"] else "",
        "ss_clip_skip": "None",  # as kohya writes it for layers that are read as the base itself reads them
        "ss_training_started_at": about.get("started", ""),
        "ss_num_train_images": about.get("train_images", ""),
        "ss_tag_frequency": about.get("tag_frequency", ""),
    }
    spec = checkpoint_metadata(adapter.family, about, v_prediction, kind="/lora")
    special = _architecture(naming, adapter)
    if adapter.alike:
        del spec["modelspec.architecture"]  # nothing tells which of several it is
    elif special:
        spec["modelspec.architecture"] = f"{special}/lora"
    return {key: value for key, value in kohya.items() if value} | spec


def _architecture(naming: Naming, adapter: Adapter) -> str:
    return naming.architecture_of(denoiser_config(adapter.base_folder)) if naming.architecture_of else ""


def with_numbers(
    metadata: Mapping[str, str], tensors: Mapping[str, Tensor], rank: int | None, alpha: float | None
) -> dict[str, str]:
    """The metadata with what the tensors of the file say: rank and alpha, and the hashes by which UIs know a file.

    `sshs_*` are as kohya's sd-scripts compute them: SHA-256 of everything after the header; and the old hash, of
    64 KiB at 1 MiB of a file with only the `ss_*` strings. modelspec's hash is the first of them.

    Args:
        rank: the largest in the file; alpha: the file's, or that of a module of this rank. None if it has none.
    """
    ss = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    numbers = {"ss_network_dim": rank, "ss_network_alpha": alpha}
    ss |= {key: str(value) for key, value in numbers.items() if value is not None}
    content = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, ss)
    size = int.from_bytes(content[:8], "little")
    whole = hashlib.sha256(memoryview(content)[8 + size :]).hexdigest()
    hashes = {
        "sshs_model_hash": whole,
        "sshs_legacy_hash": _legacy_hash(content, size),
        "modelspec.hash_sha256": f"0x{whole}",
    }
    return dict(metadata) | ss | hashes


def _legacy_hash(content: bytes, size: int) -> str:
    """safetensors writes the metadata in random order: it is sorted here, so that the hash does not change by it."""
    start, length = LEGACY
    if 8 + size > start:
        header = parse_json(content[8 : 8 + size].decode(), "the header", dict)
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        content = content[:8] + text.ljust(size) + content[8 + size :]
    return hashlib.sha256(content[start : start + length]).hexdigest()[:8]


def checkpoint_metadata(family: str, about: dict[str, str], v_prediction: bool, kind: str = "") -> dict[str, str]:
    """`modelspec.*` and `finetune_*` strings; empty values are left out."""
    labels = FAMILIES[family].naming.labels
    architecture = (v_prediction and labels.v_architecture) or labels.architecture
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{architecture}{kind}",
        "implementation": labels.implementation,
        "title": about["title"],
        "resolution": about["resolution"],
        "date": about.get("date", written_date(datetime.now(UTC))),
        "trigger_phrase": about["trigger_phrase"],
        "prediction_type": "v" if v_prediction else labels.prediction,
    }
    own = {f"finetune_{key}": about[key] for key in about.keys() - SPECIFIED}
    return {f"modelspec.{key}": value for key, value in spec.items() if value} | own


def written_date(moment: datetime) -> str:
    """The date in modelspec's format; `moment` is in UTC."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")

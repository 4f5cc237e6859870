"""Finds a base (the tiny base, a folder, a hub id or a single file), loads it, and computes its hash."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from finetune.core.errors import BadInput
from finetune.core.pickles import may_read_pickles
from finetune.families.base import Family
from finetune.families.naming.single_file import detect, unpack
from finetune.families.registry import FAMILIES, family_of

NEUTRAL_PROMPTS = "neutral_prompts.txt"  # beside model_index.json: what a base draws for `prior.others`


def load_family(
    source: str,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    like: str | None = None,
    without: Sequence[str] = (),
) -> Family:
    """Loads "tiny", a diffusers folder, a hub id or a single-file checkpoint, frozen and in eval mode. `without` names
    optional parts to leave out.

    Raises:
        BadInput: the base does not exist, is not a diffusers folder, has an unknown family, or lacks a part.
    """
    folder = resolve_base(source, revision, like)
    return family_of(folder).load(folder, dtype, without)


def resolve_base(source: str, revision: str | None = None, like: str | None = None, weights: bool = True) -> Path:
    """The local diffusers folder of a base.

    A hub id is downloaded, or found in the hub's cache; `weights=False` downloads only its configs. A single file is
    converted to a folder in the cache, with the configs and tokenizers of `like` (None: the family's usual hub id).

    Raises:
        BadInput: the base does not exist, can't be downloaded, or can't be converted.
    """
    if source == "tiny":
        return _tiny()
    folder = Path(source).expanduser()
    if folder.is_file():
        return _from_file(folder, like)
    if folder.is_dir():
        return folder.absolute()
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise BadInput(
            f"the base {source!r} is not a folder: give 'tiny', a diffusers folder or a hub id like owner/name"
        )
    return _download(source, revision, weights)


def _tiny() -> Path:
    folder = Path(os.environ.get("FINETUNE_TINY_BASE") or Path(__file__).parents[1] / "tiny_base")
    if not (folder / "model_index.json").is_file():
        raise BadInput(f"the tiny base is not in {folder}: install the package again")
    return folder


def _from_file(file: Path, like: str | None) -> Path:
    name, _ = family_of_file(file)
    layout = FAMILIES[name].naming.single_file
    assert layout is not None  # `family_of_file` finds no other
    folder = resolve_base(like) if like else _download(layout.like, None, weights=False)
    if family_of(folder).name != name:
        raise BadInput(
            f"the base {file} is of family {name} but base.like={like} is of family {family_of(folder).name}: "
            "choose a "
            f"folder of family {name}"
        )
    return unpack(file, folder, FAMILIES[name].sources, layout, by_header=like is None)


def family_of_file(file: Path) -> tuple[str, dict[str, torch.Size]]:
    """The family of a single-file checkpoint, and its tensors' shapes by name. Only the header is read.

    Raises:
        BadInput: it is not a complete safetensors file, or not a checkpoint of a supported kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            shapes = {key: torch.Size(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BadInput(
            f"the base {file} is not a complete safetensors file ({error}): give a .safetensors checkpoint"
        ) from error
    layouts = {name: kind.naming.single_file for name, kind in FAMILIES.items() if kind.naming.single_file is not None}
    try:
        return detect(list(shapes), shapes, layouts), shapes
    except BadInput as fault:
        raise BadInput(f"the base {file} can't be used: {fault}") from fault


def _download(source: str, revision: str | None, weights: bool = True) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["README.md", NEUTRAL_PROMPTS, "*.json", "*/*.json", "*/*.txt", "*/*.model"]
    if weights:
        patterns += ["*/*.safetensors", *(["*/*.bin"] if may_read_pickles() else [])]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(
            f"the base {source!r} is not a local folder, and can't be fetched from the hub ({reason}): check the "
            "name, your connection, or `hf auth login` for a gated model"
        ) from error

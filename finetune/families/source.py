"""Where a base comes from: the tiny base, a folder, the hub, a single file; and its hash."""

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


def load_family(
    source: str,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    like: str | None = None,
    without: Sequence[str] = (),
) -> Family:
    """Loads "tiny", a diffusers folder, a hub id or a single-file checkpoint, frozen and in eval mode; `without` names
    parts to leave out, where the family can do without.

    Raises:
        BadInput: nothing is there, it is no diffusers folder, its family is unknown or a part of it is missing.
    """
    folder = resolve_base(source, revision, like)
    return family_of(folder).load(folder, dtype, without)


def resolve_base(source: str, revision: str | None = None, like: str | None = None, weights: bool = True) -> Path:
    """A base's name as a local diffusers folder; a hub id is downloaded (or found in the hub's cache), of which
    `weights=False` takes the configs alone; a single file is taken apart into the cache, with configs and tokenizers
    of `like` (None: the family's own on the hub)."""
    if source == "tiny":
        return _tiny()
    folder = Path(source).expanduser()
    if folder.is_file():
        return _from_file(folder, like)
    if folder.is_dir():
        return folder.absolute()
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise BadInput(
            f"the base {source!r} is no folder: give 'tiny', a diffusers folder or a hub id like owner/name"
        )
    return _download(source, revision, weights)


def _tiny() -> Path:
    folder = Path(os.environ.get("FINETUNE_TINY_BASE") or Path(__file__).parents[1] / "tiny_base")
    if not (folder / "model_index.json").is_file():
        raise BadInput(f"the tiny base is not in {folder}: install the package again")
    return folder


def _from_file(file: Path, like: str | None) -> Path:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            shapes = {key: torch.Size(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BadInput(
            f"the base {file} is no whole safetensors file ({error}): give a .safetensors checkpoint"
        ) from error
    layouts = {name: kind.naming.single_file for name, kind in FAMILIES.items() if kind.naming.single_file is not None}
    try:
        name = detect(list(shapes), shapes, layouts)
    except BadInput as fault:
        raise BadInput(f"the base {file} can't be used: {fault}") from fault
    folder = resolve_base(like) if like else _download(layouts[name].like, None, weights=False)
    if family_of(folder).name != name:
        raise BadInput(
            f"the base {file} is a {name} but base.like={like} a {family_of(folder).name}: choose one like it"
        )
    return unpack(file, folder, FAMILIES[name].sources, layouts[name])


def _download(source: str, revision: str | None, weights: bool = True) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["README.md", "*.json", "*/*.json", "*/*.txt", "*/*.model"]
    if weights:
        patterns += ["*/*.safetensors", *(["*/*.bin"] if may_read_pickles() else [])]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(
            f"the base {source!r} is neither a folder here nor could it be fetched from the hub ({reason}): check the "
            "name, your connection, or `hf auth login` for a gated model"
        ) from error

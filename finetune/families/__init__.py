"""Base models: where they come from, and which family a folder is of.

Every module in this package that defines a `Family` with a `name` is a family: a new one is one new file.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.errors import BadInput
from finetune.families.base import Family
from finetune.families.checkpoint import LIKE, detect, unpack
from finetune.families.layout import strip_text_model
from finetune.families.weights import pickle_allowed
from finetune.files import cache_dir, sha256, write_json


def _discover() -> dict[str, type[Family]]:
    found: dict[str, type[Family]] = {}
    for module in pkgutil.iter_modules(__path__):
        for item in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if inspect.isclass(item) and issubclass(item, Family) and not inspect.isabstract(item):
                found[item.name] = item
    return dict(sorted(found.items()))


REGISTRY: dict[str, type[Family]] = _discover()
DENOISERS = sorted({family.sources["denoiser"][0] for family in REGISTRY.values()}, reverse=True)


def load(
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
    folder = resolve(source, revision, like)
    return family_of(folder).load(folder, dtype, without)


def resolve(source: str, revision: str | None = None, like: str | None = None, weights: bool = True) -> Path:
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
    try:
        name = detect(list(shapes), shapes)
    except BadInput as fault:
        raise BadInput(f"the base {file} can't be used: {fault}") from fault
    folder = resolve(like) if like else _download(LIKE[name], None, weights=False)
    if family_of(folder).name != name:
        raise BadInput(
            f"the base {file} is a {name} but base.like={like} a {family_of(folder).name}: choose one like it"
        )
    return unpack(file, folder, family_of(folder))


def _download(source: str, revision: str | None, weights: bool = True) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["README.md", "*.json", "*/*.json", "*/*.txt", "*/*.model"]
    if weights:
        patterns += ["*/*.safetensors", *(["*/*.bin"] if pickle_allowed() else [])]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(
            f"the base {source!r} is neither a folder here nor could it be fetched from the hub ({reason}): check the "
            "name, your connection, or `hf auth login` for a gated model"
        ) from error


def family_of(folder: Path) -> type[Family]:
    """The family of a diffusers folder, told from its configs."""
    index = read_config(folder, "model_index.json")
    part = next((name for name in DENOISERS if (folder / name / "config.json").is_file()), None)
    if part is None:
        raise BadInput(
            f"{folder} has no {' or '.join(f'{name}/config.json' for name in DENOISERS)}: the base must be a whole "
            "diffusers folder"
        )
    denoiser = read_config(folder, f"{part}/config.json")
    for family in REGISTRY.values():
        if family.matches(index, denoiser):
            return family
    raise BadInput(
        f"{folder} is a {index.get('_class_name')!r} with {denoiser.get('in_channels')} input channels; "
        f"supported are {', '.join(REGISTRY)}: choose a text-to-image base of those"
    )


def read_config(folder: Path, name: str) -> dict[str, Any]:
    file = folder / name
    if not file.is_file():
        raise BadInput(f"{folder} has no {name}: the base must be a diffusers folder")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{file} is no JSON ({error}): fetch the base again") from error


def base_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of a base's configs and weights (hashes are kept by path, size and time)."""
    known_file = cache_dir() / "file-hashes.json"
    known: dict[str, str] = json.loads(known_file.read_text(encoding="utf-8")) if known_file.is_file() else {}
    before = len(known)
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*"), key=lambda file: file.parts):  # Windows' own order knows no case
        if file.suffix not in (".json", ".txt", ".safetensors", ".bin") or not file.is_file():
            continue
        if file.suffix == ".bin" and any(file.parent.glob("*.safetensors")):
            continue  # never read
        stat = file.stat()
        key = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        known[key] = known.get(key) or sha256(file)
        digest.update(f"{file.relative_to(folder).as_posix()}={known[key]}\n".encode())
    if len(known) != before:
        write_json(known_file, known)
    return digest.hexdigest()


def weight_shapes(folder: Path) -> dict[str, dict[str, torch.Size]]:
    """part -> module path, without `text_model.` -> its weight's shape; from configs alone, on the meta device."""
    return {
        part: {
            strip_text_model(path): child.weight.shape
            for path, child in skeleton.named_modules()
            if isinstance(getattr(child, "weight", None), torch.Tensor)
        }
        for part, skeleton in family_of(folder).skeletons(folder).items()
    }


def own_paths(folder: Path) -> dict[str, dict[str, str]]:
    """part -> module path without `text_model.` -> the path that the module really has: PEFT goes by it."""
    return {
        part: {strip_text_model(path): path for path, _ in skeleton.named_modules()}
        for part, skeleton in family_of(folder).skeletons(folder).items()
    }


def is_transformer(family: str) -> bool:
    return REGISTRY[family].sources["denoiser"][0] == "transformer"

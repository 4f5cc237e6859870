"""What is known of a base before it is loaded: family and size. A hub id that was never fetched tells neither."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.core.errors import BadInput
from finetune.families.toy import TINY

if TYPE_CHECKING:
    from finetune.families.settings import Base


@dataclass(frozen=True)
class KnownBase:
    """A base by its name. `family` and `parameters` (those of its denoiser) are None until its configs are read."""

    source: str
    family: str | None = None
    parameters: int | None = None

    @property
    def is_known(self) -> bool:
        """Whether reading its configs would tell nothing new that matters: tiny is known by its name."""
        return self.source == TINY or self.family is not None


def known_base(base: Base, download: bool = False) -> KnownBase:
    """Reads the configs of a base that is on this disk; with `download` also those of a hub id.

    A base that can't be read stays unknown: loading it says what is wrong.
    """
    unknown = KnownBase(base.source)
    folder = Path(base.source).expanduser() if base.source == TINY or Path(base.source).exists() else _cached(base)
    if unknown.is_known or (folder is None and not download):
        return unknown
    try:
        return _from_file(folder, base.source) if folder and folder.is_file() else _from_folder(folder, base)
    except (BadInput, OSError):
        return unknown


def _cached(base: Base) -> Path | None:
    """The folder of a hub id that was fetched before."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(base.source, "model_index.json", revision=base.revision)
    except (HFValidationError, ValueError, OSError):  # no hub id
        return None
    return Path(found).parent if isinstance(found, str) else None


def _from_folder(folder: Path | None, base: Base) -> KnownBase:
    from finetune.families.parts import skeletons
    from finetune.families.registry import family_of
    from finetune.families.source import resolve_base

    path = folder or resolve_base(base.source, base.revision, base.like, weights=False)
    family = family_of(path)
    denoiser = skeletons(family.sources, path, ["denoiser"])["denoiser"]
    return KnownBase(base.source, family.name, sum(parameter.numel() for parameter in denoiser.parameters()))


def _from_file(file: Path, source: str) -> KnownBase:
    from finetune.families.naming.single_file import UNET
    from finetune.families.source import family_of_file

    family, shapes = family_of_file(file)
    return KnownBase(source, family, sum(shape.numel() for key, shape in shapes.items() if key.startswith(UNET)))

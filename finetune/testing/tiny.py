"""Small random bases of the real classes, by family, for tests and contract tests.

A package that adds a family registers its own writer as an entry point of the group `finetune.testing.tiny`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import cast

from finetune.core.errors import BadInput
from finetune.testing.tiny_transformers import write_flux, write_sd3
from finetune.testing.tiny_unets import write_sd, write_sdxl, write_sdxl_refiner

Writer = Callable[[Path, int], None]
TINY: dict[str, Writer] = {
    "sd1": lambda folder, seed: write_sd(folder, seed, linear_projection=False),
    "sd2": lambda folder, seed: write_sd(folder, seed, linear_projection=True),
    "sdxl": write_sdxl,
    "sdxl-refiner": write_sdxl_refiner,
    "sd3": write_sd3,
    "flux": write_flux,
}


def write_tiny(family: str, folder: Path, seed: int = 0) -> None:
    """Writes a small, real, randomly initialised base of `family` as a diffusers folder.

    Raises:
        BadInput: neither this package nor an entry point has a writer for the family.
    """
    _writer(family)(folder, seed)


def _writer(family: str) -> Writer:
    if family in TINY:
        return TINY[family]
    outside = next((entry for entry in entry_points(group="finetune.testing.tiny") if entry.name == family), None)
    if outside is None:
        raise BadInput(
            f"there is no small base for the family {family!r}: register a function (folder, seed) that writes one as "
            "an entry point of the group finetune.testing.tiny"
        )
    return cast(Writer, outside.load())

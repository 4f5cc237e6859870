"""Small random bases of the true classes, by family: what tests and contract tests run on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
    """Writes a small, real, randomly initialised base of `family` as a diffusers folder."""
    TINY[family](folder, seed)

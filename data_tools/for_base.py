"""Options that several commands share: the base that photos are for, and a detector."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.show import whole_number
from finetune.core.errors import BadInput

if TYPE_CHECKING:
    from data_tools.vision import Detector

USUAL = 512  # pixels: of SD 1.x


def add_base(parser: argparse.ArgumentParser, token: bool = True) -> None:
    """Adds --base, --resolution and --token: what photos and captions are checked against, or made for."""
    parser.add_argument(
        "--base",
        help="the base to train: tiny, a diffusers folder or a hub id; sets the resolution and the longest caption",
    )
    parser.add_argument(
        "--resolution",
        type=whole_number(1, "pixels"),
        help="training resolution in pixels (default: the base's, or 512)",
    )
    if token:
        parser.add_argument("--token", default="", help="a word that must be in every caption, such as sks")


def add_detector(parser: argparse.ArgumentParser) -> None:
    """Adds --detector and --find."""
    parser.add_argument(
        "--detector", metavar="FOLDER|ID", help="an object detector of transformers: a folder or hub id"
    )
    parser.add_argument(
        "--find", action="append", default=[], metavar="NAME", help="what it looks for, such as face; again for more"
    )


def detector_of(options: argparse.Namespace) -> Detector | None:
    """The detector that the options name.

    Raises:
        BadInput: --find without --detector, or a detector that can't be used.
    """
    if options.detector is None:
        if options.find:
            raise BadInput("--find says what a detector looks for: give one with --detector")
        return None
    from finetune.core.logging import quiet_import

    with quiet_import():
        from data_tools.vision import Detector
    return Detector(options.detector, options.find)


def base_and_resolution(options: argparse.Namespace) -> tuple[Path | None, int, str]:
    """The folder of the base (None: none was named), the resolution in pixels, and where that is from."""
    base = _base_folder(options.base) if options.base else None
    return base, *_resolution(options, base)


def _base_folder(source: str) -> Path:
    from finetune.core.logging import quiet_import

    with quiet_import():
        from finetune.families.source import resolve_base

    return resolve_base(source, weights=False)


def _resolution(options: argparse.Namespace, base: Path | None) -> tuple[int, str]:
    """The training resolution in pixels, and where it is from."""
    if options.resolution:
        return options.resolution, "--resolution"
    if base is None:
        return USUAL, "SD 1.x's resolution; --base NAME takes another base's, --resolution any"
    from finetune.families.configs import well_formed
    from finetune.families.registry import family_of

    with well_formed(base):
        family = family_of(base)
        return family.resolution_of(base), f"the resolution of {options.base}, family {family.name}"

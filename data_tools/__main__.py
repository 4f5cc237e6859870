"""Tools for folders of photos: `python -m data_tools check PHOTOS` and `python -m data_tools unpack DATASET OUT`.

Exit codes: 0 no problems, 1 problems found, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

USUAL = 512  # pixels: of SD 1.x

if TYPE_CHECKING:
    from data_tools.check import Findings


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 no problems, 1 problems found, 2 bad input."""
    options = _parser().parse_args(arguments)
    from finetune.core.errors import BadInput
    from finetune.core.logging import printable

    printable()
    try:
        code: int = options.run(options)
        return code
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _check(options: argparse.Namespace) -> int:
    from data_tools.check import check

    resolution, why = _resolution(options)
    findings = check(options.photos, resolution)
    findings.notes.insert(0, f"checked for training at {resolution} pixels ({why})")
    if options.json:
        _print_json(findings)
    else:
        _print_table(findings)
    return 0 if findings.fine else 1


def _resolution(options: argparse.Namespace) -> tuple[int, str]:
    """The training resolution in pixels, and where it is from."""
    if options.resolution:
        return options.resolution, "--resolution"
    if not options.base:
        return USUAL, "SD 1.x's resolution; --base NAME takes another base's, --resolution any"
    from finetune.core.logging import quiet_import

    with quiet_import():
        from finetune.families.configs import well_formed
        from finetune.families.registry import family_of
        from finetune.families.source import resolve_base

    folder = resolve_base(options.base, weights=False)
    with well_formed(folder):
        family = family_of(folder)
        return family.resolution_of(folder), f"the resolution of {options.base}, family {family.name}"


def _unpack(options: argparse.Namespace) -> int:
    from data_tools.unpack import unpack

    count = unpack(options.source, options.out, options.split, options.image, options.caption, options.limit)
    print(f"{count} images in {options.out}; check them with: python -m data_tools check {options.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_tools", description="Tools for folders of photos.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "check",
        help="list every photo with its size, orientation, problems, near-duplicates and caption",
        description="Check a folder of photos before training. Exit 0: no problems, 1: problems found, 2: bad input.",
    )
    command.add_argument("photos", type=Path, metavar="PHOTOS", help="a folder of photos")
    command.add_argument("--base", help="the base to train: tiny, a diffusers folder or a hub id; sets the resolution")
    command.add_argument(
        "--resolution", type=_pixels, help="training resolution in pixels (default: the base's, or 512)"
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(run=_check)
    command = commands.add_parser(
        "unpack", help="write a data set of the hub, or a local one, as a folder of images with captions"
    )
    command.add_argument("source", metavar="DATASET", help="a hub id, an image folder or a .parquet file")
    command.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    command.add_argument("--split", default="train")
    command.add_argument("--image", default="image", help="the column that holds the images")
    command.add_argument("--caption", default="text", help="the column that holds the captions, if there is one")
    command.add_argument("--limit", type=_number, help="write at most this many images")
    command.set_defaults(run=_unpack)
    return parser


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of images: give a whole number such as 100")
    return int(text)


def _pixels(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of pixels: give a whole number such as 512")
    return int(text)


def _print_json(findings: Findings) -> None:
    import json

    files = [
        {
            "name": file.name,
            "size": file.size,
            "orientation": file.orientation or None,
            "caption": file.caption,
            "sha256": file.digest or None,
            "dhash": None if file.fingerprint is None else f"{file.fingerprint:016x}",
            "problems": file.problems,
            "notes": file.notes,
        }
        for file in findings.files
    ]
    about = {"folder": findings.folder.as_posix(), "fine": findings.fine, "problems": findings.problems}
    # ASCII: a pipe may have any encoding
    print(json.dumps(about | {"notes": findings.notes, "files": files}, indent=2))


def _print_table(findings: Findings) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table("file", "size", "stored", "problems", "notes", "caption", box=None)
    for file in findings.files:
        size = "x".join(map(str, file.size)) if file.size else ""
        problems, notes = (escape("; ".join(texts)) for texts in (file.problems, file.notes))
        caption = escape(file.caption or "")
        table.add_row(escape(file.name), size, file.orientation, f"[red]{problems}[/]", notes, caption)
    console.print(table)
    for text in findings.problems:
        console.print(f"[red]problem[/] {escape(text)}", highlight=False)
    for text in findings.notes:
        console.print(f"note    {escape(text)}", highlight=False)
    verdict = "nothing to do" if findings.fine else "see the problems above"
    console.print(f"{len(findings.files)} images in {findings.folder}: {verdict}", highlight=False, markup=False)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m data_tools check PHOTOS [--resolution 512] [--json]`: exit 0 fine, 1 problems found, 2 bad input."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_tools.check import Findings


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    from data_tools.check import check
    from finetune.errors import BadInput

    try:
        findings = check(options.photos, options.resolution)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        _print_json(findings)
    else:
        _print_table(findings)
    return 0 if findings.fine else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_tools", description="Tools for folders of photos.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "check",
        help="every photo with its size, orientation, problems, near-duplicates and caption",
        description="Looks at a folder of photos before it is trained on; exit 0 fine, 1 problems found, 2 bad input.",
    )
    command.add_argument("photos", type=Path, metavar="PHOTOS", help="a folder of photos")
    command.add_argument("--resolution", type=_pixels, default=512, help="pixels trained at (default: 512)")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _pixels(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of pixels: give one such as 512")
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
    about = {"folder": str(findings.folder), "fine": findings.fine, "problems": findings.problems}
    print(json.dumps(about | {"notes": findings.notes, "files": files}, indent=2, ensure_ascii=False))


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
    console.print(f"{len(findings.files)} pictures in {findings.folder}: {verdict}", highlight=False, markup=False)


if __name__ == "__main__":
    sys.exit(main())

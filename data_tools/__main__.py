"""`python -m data_tools COMMAND`, the same as `finetune data COMMAND`: from a pile of files to a training set.

Exit codes: 0 no problems, 1 problems found, 2 bad input. To add a command, add a module with `options` and `run`, and
its line to `COMMANDS`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# One module each. It is imported only when its command is used: --help loads no library for images.
COMMANDS = {
    "check": "say what is wrong with the photos and captions of a folder, worst first",
    "sheet": "write a contact sheet and a page with every finding beside its photo",
    "dedupe": "write a folder without the copies and near-copies of a photo",
    "split": "write a folder of photos for training and one of held-out photos",
    "crop": "write a folder of photos cropped around their subject",
    "mask": "write a folder of photos with a mask of the subject beside each",
    "resize": "write a folder of photos of a base's size",
    "tags": "write a folder with changed captions, or count the tags",
    "caption": "write captions by models, taggers, templates and replacements, beside the originals",
    "convert": "convert photos and captions between formats, and other trainers' settings into recipes",
    "unpack": "write a data set of the hub, or a local one, as a folder of images with captions",
}


def main(arguments: Sequence[str] | None = None, prog: str = "python -m data_tools") -> int:
    """Runs a command and returns its exit code: 0 no problems, 1 problems found, 2 bad input."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _undo_parser(prog).parse_args(_undo_arguments(given)) if "--undo" in given else _parsed(given, prog)
    from finetune.core.errors import BadInput, disk_sentence
    from finetune.core.logging import plain, printable

    printable()
    try:
        with _progress_shown(quiet=getattr(options, "json", False)):
            code: int = options.run(options)
            return code
    except BadInput as error:
        print(plain(f"error: {error}"), file=sys.stderr)
        return 2
    except OSError as error:
        if not disk_sentence(error):
            raise
        print(plain(f"error: {disk_sentence(error)}"), file=sys.stderr)
        return 2


def _parsed(given: list[str], prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog, description="From a pile of files to a training set.")
    parser.epilog = f"Photos are never changed. Take back what a command wrote: {prog} --undo FOLDER"
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    asked = next((word for word in given if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == asked:
            module = importlib.import_module(f"data_tools.{name}")
            module.options(command)
            command.set_defaults(run=module.run)
    return parser.parse_args(given)


def _undo_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"{prog} --undo", description="Take back what a command wrote.")
    parser.add_argument("--undo", type=Path, metavar="FOLDER", help="a folder that a command wrote, or its manifest")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_undo)
    return parser


def _undo_arguments(given: list[str]) -> list[str]:
    """`data dedupe --undo FOLDER` means the same: the manifest knows the command."""
    return given[1:] if given[0] in COMMANDS else given


def _undo(options: argparse.Namespace) -> int:
    from data_tools.show import say, say_json
    from data_tools.undo import undo

    done = undo(options.undo, options.dry_run)
    if options.json:
        say_json(done.values())
    else:
        say(done.sentence)
    return 0


@contextmanager
def _progress_shown(quiet: bool) -> Iterator[None]:
    """Bars in a terminal; elsewhere lines on stderr, so that stdout holds the result alone."""
    from finetune.core.events import sent_to
    from finetune.core.progress import ProgressLines

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    consumer: Any = ProgressLines(say)
    if sys.stdout.isatty() and not quiet:
        from finetune.cli.output import ProgressBars, in_terminal

        consumer = ProgressBars() if in_terminal() else consumer
    with sent_to(consumer):
        yield


if __name__ == "__main__":
    sys.exit(main())

"""Runs other programs' own loaders on the LoRA files that we export, for every family and kind of adapter.

    python benchmarks/loaders.py                               # the installed readers: diffusers, peft, lycoris-lora
    python benchmarks/loaders.py --invokeai DIR --comfyui DIR  # and those of UIs, from folders with their code

Each file is written from an adapter with random weights on a base with the real one's modules in small widths, and
read by the program's own code. Per file and reader: how many modules it applied, and the largest error of a module's
change, |read - ours| / |ours|, where "ours" is what our own reader finds in the file. Every row is added to a file of
JSON lines with the date and the loader's version.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

import diffusers
import torch
import transformers
from loaders_cases import BASES, Base, Case, cases
from loaders_readers import UIS, DiffusersReader, LycorisReader, PeftReader, Reader


@dataclass(frozen=True)
class Row:
    """What one reader did with one file. `error`: the largest of a module it applied; `refused`: what it said."""

    date: str
    reader: str
    version: str
    base: str
    kind: str
    form: str
    applied: int
    of: int
    error: float | None
    refused: str = ""

    @property
    def line(self) -> str:
        result = self.refused or ("nothing applied" if self.error is None else f"error {self.error:.0e}")
        names = f"{self.base:13} {self.kind:24} {self.form:10} {self.reader:10} {self.version:8}"
        return f"{names} {self.applied:4} of {self.of:4}  {result}"


def measured(reader: Reader, case: Case) -> Row:
    """Reads one file. A reader that raises has refused it."""
    found, refused = {}, ""
    try:
        with torch.no_grad():
            found = reader.deltas(case)
    except Exception as error:  # whatever a program raises is its answer
        refused = f"{type(error).__name__}: {error}".splitlines()[0][:100]
    errors = [
        float((found[place].reshape(wanted.shape) - wanted).norm() / wanted.norm())
        for place, wanted in case.ours.items()
        if place in found
    ]
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    worst = max(errors, default=None)
    facts = (case.base.model, case.kind, case.form, len(errors), len(case.ours), worst, refused)
    return Row(day, reader.name, reader.version, *facts)


def readers_of(arguments: argparse.Namespace) -> list[Reader]:
    """The installed ones, and those of the UIs whose folders are given."""
    found: list[Reader] = [DiffusersReader(), PeftReader()]
    if find_spec("lycoris"):
        found.append(LycorisReader())
    return found + [ui(folder) for name, ui in UIS.items() if (folder := getattr(arguments, name)) is not None]


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in UIS:
        parser.add_argument(f"--{name}", type=Path, help="a folder with its code")
    parser.add_argument("--base", action="append", choices=list(BASES), help="only these bases")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("loaders.jsonl"))
    arguments = parser.parse_args(given)
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    readers = readers_of(arguments)
    with tempfile.TemporaryDirectory() as work, arguments.out.open("a", encoding="utf-8", newline="\n") as out:
        for model in arguments.base or BASES:
            base = Base.written(model, Path(work) / model.replace(" ", "-"))
            for case in cases(base, Path(work)):
                for row in (measured(reader, case) for reader in readers if reader.reads(case)):
                    print(row.line, flush=True)
                    out.write(json.dumps(asdict(row)) + "\n")
                    out.flush()


if __name__ == "__main__":
    main()

"""Creates the table of docs/families.md with the estimates of `finetune plan`.

`python -m finetune.testing.tables docs/families.md` writes it between two marks on that page; without a file it prints
the table.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from finetune.config.load import parse_recipe
from finetune.core.devices import GIB
from finetune.core.errors import BadInput
from finetune.jobs.estimate import Estimate, estimate
from finetune.testing.published import PUBLISHED, write

BEGIN, END = "<!-- by python -m finetune.testing.tables docs/families.md -->", "<!-- end -->"
HEAD = """| base | denoiser | LoRA trains | modules | LoRA | with checkpointing | full | with checkpointing |
|---|---|---|---|---|---|---|---|"""


def sizes_row(name: str) -> str:
    """The table row of a published base: LoRA of rank 16 on all linear layers in bf16, and full with 8-bit Adam."""
    with tempfile.TemporaryDirectory() as folder:
        base = write(name, Path(folder))
        lora, light_lora = (_estimate(base, "lora", "adamw", on) for on in (False, True))
        full, light_full = (_estimate(base, "full", "adamw8bit", on) for on in (False, True))
    memory = [f"{item.total / GIB:.1f}" for item in (lora, light_lora, full, light_full)]
    denoiser, trained = f"{lora.parameters['denoiser'] / 1e6:,.0f}M", f"{lora.trained_parameters / 1e6:.1f}M"
    return f"| {' | '.join([name, denoiser, trained, str(lora.modules), *memory])} |"


def sizes() -> str:
    return "\n".join([HEAD, *map(sizes_row, PUBLISHED)])


def between_marks(text: str) -> str:
    """The text between the marks of a page.

    Raises:
        BadInput: a mark is missing.
    """
    _, begin, rest = text.partition(BEGIN)
    held, end, _ = rest.partition(END)
    if not (begin and end):
        raise BadInput(f"the page does not have the marks {BEGIN} and {END}: put them where the table belongs")
    return held.strip()


def _estimate(base: Path, method: str, optimizer: str, checkpointing: bool) -> Estimate:
    sections = {
        "base": str(base),
        "data": {"photos": "photos", "class_noun": "dog"},
        "method": {"kind": method},
        "optim": {"kind": optimizer},
        "run": {"precision": "bf16"},
    }
    return estimate(parse_recipe(sections), checkpointing)


def main(arguments: list[str]) -> None:
    if not arguments:
        print(sizes())
        return
    page = Path(arguments[0])
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace(between_marks(text), sizes()), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(sys.argv[1:])

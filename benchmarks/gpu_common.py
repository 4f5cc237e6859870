"""What the parts of benchmarks/gpu.py share: where they run, the rows that they give, small recipes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


@dataclass(frozen=True)
class Where:
    """`tiny`: everything at the size of the tests, on a CPU. `work`: a folder for what the part writes."""

    device: torch.device
    tiny: bool
    work: Path

    def precision(self, wanted: str) -> str:
        """fp16 is refused on a CPU."""
        return "bf16" if self.tiny and wanted == "fp16" else wanted

    def label(self, what: str) -> str:
        """What a row says was run, where `precision` may have put another in fp16's place."""
        return what.replace("fp16", "bf16 in place of fp16") if self.tiny else what


@dataclass(frozen=True)
class Part:
    """`seconds`: how long it may take. `run` gives one row after the other, each kept as soon as it is there."""

    name: str
    seconds: int
    run: Callable[[Where], Iterator[Row]]


def check(what: str, ok: bool, value: str = "") -> Row:
    """A row that says whether something works."""
    return {"table": "works", "what": what, "ok": ok, "value": value}


def attempt(what: str, work: Callable[[], str]) -> Row:
    """A check that fails with the error's own words, so that the parts after it still run."""
    try:
        return check(what, True, work())
    except Exception as error:  # whatever breaks on a GPU is a result here
        return check(what, False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    finally:
        forget()


def forget() -> None:
    """Frees what the last case held, and lets Accelerate take another precision."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tiny_base(where: Where, family: str) -> Path:
    """A small random base of the true classes."""
    from finetune.testing.tiny import write_tiny

    folder = where.work / "bases" / family
    if not (folder / "model_index.json").is_file():
        write_tiny(family, folder)
    return folder


def tiny_recipe(where: Where, family: str, overrides: tuple[str, ...] = ()) -> Any:
    """A short run on a small random base: two steps, one image a prompt."""
    from finetune.config.load import parse_recipe
    from finetune.jobs.demo import demo_images

    plain = {
        "base": str(tiny_base(where, family)),
        "data": {"photos": str(demo_images()), "class_noun": "mug", "token": "zwx"},
        "method": {"kind": "lora", "rank": 4},
        "optim": {"kind": "adamw", "lr": 1e-3},
        "run": {"steps": 2, "batch_size": 2, "precision": where.precision("bf16")},
        "sample": {"count": 1, "steps": 2, "prompts": ["a photo of {token} {noun}"]},
    }
    return parse_recipe(plain, overrides)

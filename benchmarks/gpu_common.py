"""Shared code of the parts of benchmarks/gpu.py: where they run, their result rows, small recipes."""

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
    """Where a part runs. `tiny`: with the sizes of the tests, on a CPU. `work`: a folder for the part's files."""

    device: torch.device
    tiny: bool
    work: Path

    def precision(self, wanted: str) -> str:
        """The precision to use: `wanted`, but bf16 instead of fp16 on a CPU, which does not support it."""
        return "bf16" if self.tiny and wanted == "fp16" else wanted

    def label(self, what: str) -> str:
        """The description of a row, with the replacement that `precision` made."""
        return what.replace("fp16", "bf16 in place of fp16") if self.tiny else what


@dataclass(frozen=True)
class Part:
    """A part of the benchmark. `seconds`: its time limit. `run` yields rows, and each is saved at once."""

    name: str
    seconds: int
    run: Callable[[Where], Iterator[Row]]


def check(what: str, ok: bool, value: str = "") -> Row:
    """A row with the result of a check."""
    return {"table": "works", "what": what, "ok": ok, "value": value}


def attempt(what: str, work: Callable[[], str]) -> Row:
    """Runs a check. An error becomes a failed row with its message, so that later checks still run."""
    try:
        return check(what, True, work())
    except Exception as error:  # any failure on a GPU is a result
        return check(what, False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    finally:
        forget()


def forget() -> None:
    """Frees the memory of the last case, and lets Accelerate use another precision."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tiny_base(where: Where, family: str) -> Path:
    """A small random base of the real classes."""
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

"""Kills a run at random moments, resumes it, and compares what comes out with the run that was never killed.

    python benchmarks/chaos.py --kills 60

A small LoRA run with class images, caching, accumulation, dropout, EMA and frequent checkpoints is started in a
process of its own and killed with SIGKILL at a random moment, again and again, until it ends; then the next run
starts, from empty caches. After most kills something of it is damaged or changed (`tampering.py`): a
checkpoint, a cache entry, a record, a photo, the base. Ends with 0 if every resume either refused with the name of
what changed, or came to an adapter with the SHA-256 of the unbroken run's, and a metrics.jsonl with its lines (timing
aside).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

from tampering import TAMPERINGS, Place, Tampering, Undo, copied_place

REFUSED = 3  # the exit code of a child that refuses
TAMPERED = 0.7  # of the kills
METHODS: dict[str, dict[str, Any]] = {"lora": {"kind": "lora", "rank": 4, "dropout": 0.1}, "full": {"kind": "full"}}
WINDOW = 0.55  # of the unbroken run: a resumed one that only has its pictures and exports left may come to its end
PHASES = ("before the first file", "class images", "latents and prompts", "training", "saving", "pictures and exports")


def write_inputs(work: Path) -> None:
    from PIL import Image

    from finetune.testing.tiny import write_tiny

    if (work / "base").is_dir():
        return
    write_tiny("sd1", work / "base")
    (work / "photos").mkdir()
    for number in range(4):
        image = Image.linear_gradient("L").rotate(90 * number).convert("RGB")
        image.save(work / "photos" / f"{number}.png")


def recipe(place: Place, method: str, optim: str) -> Any:
    from finetune.config.load import parse_recipe

    return parse_recipe(
        {
            "base": str(place.base),
            "data": {
                "photos": str(place.photos),
                "class_noun": "mug",
                "crop": "random",
                "flip": True,
                "caption_dropout": 0.1,
            },
            "prior": {"kind": "class_images", "count": 8, "steps": 4, "batch_size": 2},
            "method": METHODS[method] | {"parts": ["denoiser", "text_encoders"]},
            "optim": {"kind": optim, "lr": 1e-3, "schedule": "cosine", "warmup": 5},
            "run": {"steps": 60, "batch_size": 2, "accumulate": 2, "ema": 0.99, "checkpoint_every": 3, "keep": 3},
            "sample": {"count": 1, "steps": 2},
        }
    )


def work_on(work: Path, place: Place, kinds: tuple[str, str]) -> None:
    """What a child process does: train, or go on."""
    import torch

    from finetune.core.errors import BadInput
    from finetune.jobs.train import train

    torch.set_num_threads(1)
    os.environ["FINETUNE_CACHE"] = str(place.cache)
    noted = (work / "damaged.txt").open("a", encoding="utf-8", newline="\n")
    warnings.showwarning = lambda message, *rest: print(message, file=noted, flush=True)
    warnings.simplefilter("always", UserWarning)
    try:
        train(recipe(place, *kinds), place.run)
    except BadInput as refused:
        (work / "refused.txt").write_text(str(refused), encoding="utf-8", newline="\n")
        sys.exit(REFUSED)


def _list(counted: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counted.most_common()) or "none"


def phase_of(place: Place) -> str:
    """Where a killed run stood, from what lies there."""
    run, cache = place.run, place.cache
    if any((run / "checkpoints").glob(".*.tmp")):
        return "saving"
    if (run / "adapter" / "trained.safetensors").is_file():
        return "pictures and exports"
    if (run / "metrics.jsonl").is_file():
        return "training"
    if len(list(cache.rglob("class-images/*/*.png"))) == 8:
        return "latents and prompts"
    return "class images" if run.is_dir() else "before the first file"


class Tampered:
    """What was done to a run and is still to be met, and what came of it."""

    def __init__(self) -> None:
        self.now: tuple[Tampering, Path, Undo] | None = None
        self.done, self.refused = Counter[str](), Counter[str]()
        self.logs = False  # the run's log was damaged: rows of it may be lost, which nothing is trained from

    def maybe(self, place: Place, dice: random.Random) -> None:
        """One thing at a time: what a resume must refuse stays until it is met."""
        if self.now is not None or dice.random() > TAMPERED:
            return
        chosen = dice.choice(TAMPERINGS)
        made = chosen.apply(place, dice)
        if made is None:
            return
        self.done[chosen.name] += 1
        self.logs |= made[0].name == "metrics.jsonl"
        self.now = (chosen, *made) if chosen.refused else None
        self.last = (chosen, *made)

    def met(self, said: str) -> None:
        """A resume refused: the sentence must name what was done, which is then undone."""
        chosen, file, undo = self.now or self.last
        if (chosen.refused or file.name) not in said:
            sys.exit(f"after {chosen.name!r} of {file} a resume refused with something else: {said}")
        self.refused[chosen.name] += 1
        undo()
        self.now = None


def _row(line: str) -> dict[str, Any]:
    """A line of the log; empty for one that was damaged."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def outcome(run: Path) -> tuple[str, list[dict[str, Any]]]:
    """The adapter's hash, and the metrics without their timing."""
    from finetune.core.files import sha256

    log = run / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    rows = [{key: value for key, value in _row(line).items() if key != "seconds"} for line in lines]
    return sha256(run / "adapter" / "trained.safetensors"), rows


def is_the_unbroken(found: tuple[str, list[Any]], wanted: tuple[str, list[Any]], logs_damaged: bool) -> bool:
    return found[0] == wanted[0] and (logs_damaged or found[1] == wanted[1])


class End(Enum):
    """How a launch of a run ended."""

    KILLED = auto()
    REFUSED = auto()
    WHOLE = auto()


@dataclass(frozen=True)
class Trial:
    """One run that is started, killed and resumed until it ends."""

    work: Path
    place: Place
    kinds: tuple[str, str]
    dice: random.Random
    tampered: Tampered

    def launch(self, context: Any, longest: float | None) -> End:
        """Starts or resumes the run, and kills it at a random moment before `longest` seconds; None: it may end."""
        process = context.Process(target=work_on, args=(self.work, self.place, self.kinds))
        process.start()
        process.join(None if longest is None else self.dice.uniform(0, longest))
        code = process.exitcode
        process.kill()
        process.join()
        if code == REFUSED:
            self.tampered.met((self.work / "refused.txt").read_text(encoding="utf-8"))
            return End.REFUSED
        if code not in (None, 0):
            last = getattr(self.tampered, "last", None)
            sys.exit(f"a resumed run failed with exit code {code}: {self.place.run}; tampered last: {last}")
        if code == 0 and self.tampered.now is not None:
            sys.exit(f"a run came to its end in silence after {self.tampered.now[0].name!r}: {self.place.run}")
        return End.KILLED if code is None else End.WHOLE


def main() -> None:
    from finetune.core.logging import quiet

    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--method", choices=list(METHODS), default="lora")
    parser.add_argument("--optim", choices=["adamw", "adamw8bit"], default="adamw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="chaos-"))
    work.mkdir(parents=True, exist_ok=True)
    import finetune.jobs.train  # noqa: F401 - once, so that every child starts with everything imported
    from finetune.families.registry import FAMILIES
    from finetune.methods.registry import METHODS as REGISTERED

    assert list(FAMILIES)  # registries import their modules when they are first asked
    assert list(REGISTERED)

    kinds = (arguments.method, arguments.optim)
    dice, context = random.Random(arguments.seed), multiprocessing.get_context("fork")
    write_inputs(work)
    began = time.monotonic()
    home = Place(work / "unbroken", work / "caches" / "unbroken", work / "photos", work / "base")
    unbroken = context.Process(target=work_on, args=(work, home, kinds))
    unbroken.start()
    unbroken.join()
    length = time.monotonic() - began
    wanted = outcome(work / "unbroken")
    kills, runs, same, where, tampered = 0, 0, 0, Counter[str](), Tampered()
    while kills < arguments.kills:
        trial = Trial(work, copied_place(work, runs), kinds, dice, tampered)
        runs += 1
        while (end := trial.launch(context, length * WINDOW if kills < arguments.kills else None)) is not End.WHOLE:
            if end is End.REFUSED:
                continue
            kills += 1
            where[phase_of(trial.place)] += 1
            if kills < arguments.kills:
                tampered.maybe(trial.place, dice)
        same += is_the_unbroken(outcome(trial.place.run), wanted, tampered.logs)
        tampered.logs = False
    print(f"unbroken run: {length:.1f} s, adapter {wanted[0][:16]}")
    print(f"{kills} kills: " + ", ".join(f"{where[name]} in {name}" for name in PHASES if where[name]))
    damaged = (work / "damaged.txt").read_text(encoding="utf-8").count("is damaged")
    print(f"{tampered.done.total()} files damaged or changed, of {len(tampered.done)} kinds: {_list(tampered.done)}")
    print(f"{tampered.refused.total()} times a resume refused and named it: {_list(tampered.refused)}")
    print(f"{damaged} times a damaged checkpoint was met, named and passed over")
    print(f"{runs} runs completed, {same} with the unbroken run's adapter (SHA-256) and metrics")
    sys.exit(0 if same == runs else 1)


if __name__ == "__main__":
    main()

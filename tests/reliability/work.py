"""What started processes do (several recipes, one after the other, in one process group), and waiting for them."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

SETTINGS = (
    "data.class_noun=mug", "data.crop=random", "data.flip=true", "data.caption_dropout=0.2", "prior.kind=class_images",
    "prior.count=5", "prior.steps=1", "prior.batch_size=2", "run.steps=20", "run.batch_size=4", "sample.steps=1",
    "sample.count=1", "sample.prompts=['a {noun}']", "objective.timesteps=stratified",
)  # fmt: skip
METHODS = {
    "lora": ("method.kind=lora", "method.rank=4", "method.dropout=0.1", "optim.lr=1e-3"),
    "dora": ("method.kind=dora", "method.rank=4", "method.dropout=0.1", "optim.lr=1e-3"),
    "lokr": ("method.kind=lokr", "method.rank=4", "optim.lr=1e-3"),
    "full": ("method.kind=full", "optim.lr=1e-4"),
}
USUAL = ("lora", "full")


def methods_of(base: str) -> tuple[str, ...]:
    """All on SD1, the usual two on the others."""
    return tuple(METHODS) if base == "sd1" else USUAL


# a teacher's error is only rounding at first, which AdamW makes large in words that no photo has: LoRA trains none
OTHERS = {
    "lora": "prior.others={count: 5, steps: 1, batch_size: 2, share: 0.5, target: base}",
    "full": "prior.others={count: 5, steps: 1, batch_size: 2, share: 0.5}",
}
UNCHECKED = "export.verify=off"  # what is compared are weights and losses
PARTS = ("method.parts=[denoiser, text_encoders]", "optim.kind=adamw")


def note_writes(folder: Path, note: Path) -> None:
    """Every file below `folder` that this process opens for writing, renames or removes goes into `note`."""
    note.parent.mkdir(exist_ok=True)
    handle = note.open("a")
    modes = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & modes
        if (writes or event in ("os.rename", "os.remove", "os.mkdir")) and str(folder) in str(arguments[0]):
            os.write(handle.fileno(), f"{event} {arguments[0]}\n".encode())

    sys.addaudithook(hook)


def work(arguments: list[str]) -> tuple[int, str]:
    """arguments: a folder, the photos, and base folders; RUNS/<family>-<method> come out."""
    from finetune.core.logging import quiet, quiet_bars

    quiet()
    quiet_bars()
    import torch

    from finetune import load_recipe, train
    from finetune.core.errors import BadInput, CheckFailed

    torch.set_num_threads(1)
    out, photos, *bases = map(Path, arguments)
    os.environ["FINETUNE_CACHE"] = str(out / "cache")
    if os.environ.get("RANK", "0") != "0":
        note_writes(out, out / "written.txt")
    for base in bases:
        for name in methods_of(base.name):
            own = [f"base={base}", f"data.photos={photos}", *SETTINGS, *METHODS[name], *PARTS]
            own += [] if base.name == "sd1" else [UNCHECKED]
            try:
                train(
                    load_recipe("dreambooth-full" if name == "full" else "dreambooth-lora", own),
                    out / "runs" / f"{base.name}-{name}",
                )
            except (BadInput, CheckFailed) as error:
                return 2, str(error)
    return 0, ""


def priors(arguments: list[str]) -> tuple[int, str]:
    """arguments: a folder, the photos, a base. One recipe for each prior that has no class images of the noun."""
    from finetune.core.logging import quiet, quiet_bars

    quiet()
    quiet_bars()
    import torch

    from finetune import load_recipe, train

    torch.set_num_threads(1)
    out, photos, base = map(Path, arguments)
    os.environ["FINETUNE_CACHE"] = str(out / "cache")
    kept = [setting for setting in SETTINGS if not setting.startswith("prior.")]
    for name in USUAL:
        for prior, more in (("frozen_base", ()), ("distance", ()), ("none", (OTHERS[name],))):
            own = [f"base={base}", f"data.photos={photos}", *kept, f"prior.kind={prior}", *METHODS[name], *PARTS]
            own += [UNCHECKED, *more]
            recipe = load_recipe("dreambooth-lora" if name == "lora" else "dreambooth-full", own)
            train(recipe, out / "runs" / f"{name}-{prior}")
    return 0, ""


def verdicts(arguments: list[str]) -> tuple[int, str]:
    """arguments: a folder, the photos, a base. With images of everything else: a run that is not measured, one that
    is, and one that is stopped after a step that is to be measured, and goes on."""
    from finetune.core.logging import quiet, quiet_bars

    quiet()
    quiet_bars()
    import torch

    from finetune import load_recipe, train
    from finetune.core.errors import Stopped
    from finetune.core.events import Event, StepDone
    from finetune.core.signals import Stop

    torch.set_num_threads(1)
    out, photos, base = map(Path, arguments)
    os.environ["FINETUNE_CACHE"] = str(out / "cache")
    own = [f"base={base}", f"data.photos={photos}", *SETTINGS, *METHODS["lora"], OTHERS["lora"], UNCHECKED]
    own += ["run.ema=0.9", "run.steps=8", "prior.count=2", "optim.kind=adamw"]
    measured = ("run.verdicts_every=2", "run.keep_best=true", "run.checkpoint_every=3", "run.keep=1")
    train(load_recipe("dreambooth-lora", [*own, "run.verdicts=off"]), out / "runs" / "off")
    recipe, stop = load_recipe("dreambooth-lora", [*own, *measured]), Stop()
    train(recipe, out / "runs" / "on")

    def end(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 6:
            stop.request()

    try:
        train(recipe, out / "runs" / "stopped", events=end, stop=stop)
    except Stopped:
        train(recipe, out / "runs" / "stopped")
        return 0, ""
    return 1, "it was not stopped"


def commands(arguments: list[str]) -> tuple[int, str]:
    """arguments: the words of a `finetune` command each, as JSON. The first that fails ends it."""
    from finetune.cli.main import run

    for words in arguments:
        code, message = run(json.loads(words))
        if code:
            return code, message
    return 0, ""


def one_bad_rank(arguments: list[str]) -> tuple[int, str]:
    """arguments: a folder, a base. The second process meets a NaN in step 3."""
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests), str(tests / "training")]
    from test_trainer import Memory, run_fit

    from finetune.core.errors import CheckFailed
    from finetune.methods.lora import LoRA

    out, base = map(Path, arguments)
    rank = int(os.environ["RANK"])
    batches = Memory(4, 1, rank, 2, bad_at=2 if rank == 1 else -1)
    try:
        run_fit(base, out, LoRA(rank=2), batches=batches, checkpoint_every=2)
    except CheckFailed as error:
        return 1, str(error)
    return 0, "nothing was found"


def wait_for_steps(run: Path, count: int) -> None:
    """Until a run's metrics have so many lines."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").is_file() and len((run / "metrics.jsonl").read_text().splitlines()) >= count:
            return
        time.sleep(0.02)
    raise TimeoutError(f"{run} never came to step {count}")

"""The parts of benchmarks/gpu.py that check whether something works on this device."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_common import Row, Where, attempt, check, forget, tiny_base, tiny_recipe
from torch import Tensor

ROOT = Path(__file__).parents[1]
SCALE = 1024.0  # the loss scale for fp16, as of the loss scaler
PRECISIONS = ("fp32", "bf16", "fp16")
EXACT = 1e-4  # relative error of a gradient: the same fp32 sums in another order
RESUMED = {
    "LoRA, AdamW, bf16": ("sd1", ("run.precision=bf16",)),
    "LoRA with dropout, AdamW, fp16 with its scaler": ("sdxl", ("run.precision=fp16", "method.dropout=.1")),
    "full and text encoders, 8-bit AdamW, EMA": (
        "sd1",
        ("method={kind: full, parts: [denoiser, text_encoders]}", "optim={kind: adamw8bit, lr: 1e-3}", "run.ema=.9"),
    ),
    "LoRA on Flux": ("flux", ()),
}
IMAGES = ("prior={kind: class_images, count: 2, steps: 2}", "sample.every=1")
JOBS = {
    "SDXL LoRA, class images, previews, a rare token": ("sdxl", (*IMAGES, "data.token=auto")),
    "SD3 LoRA in fp16, class images": ("sd3", (*IMAGES, "run.precision=fp16")),
    "SDXL LoRA in fp16, previews": ("sdxl", ("run.precision=fp16", "sample.every=1")),
    "Flux LoRA, checkpointing": ("flux", ("run.gradient_checkpointing=true",)),
    "SD1 full with text encoders, 8-bit AdamW": ("sd1", RESUMED["full and text encoders, 8-bit AdamW, EMA"][1]),
    "SDXL LoRA with text encoders, frozen base": (
        "sdxl", ("method.parts=[denoiser, text_encoders]", "prior.kind=frozen_base"),
    ),
    "SD2 DoRA": ("sd2", ("method={kind: dora, rank: 4}", "export.max_error=1")),
    "SD1 LoKr": ("sd1", ("method={kind: lokr, rank: 4}", "export.max_error=1")),
    "SD1 LoHa": ("sd1", ("method={kind: loha, rank: 4}", "export.max_error=1")),
    "SD1 OFT": ("sd1", ("method={kind: oft}", "export.max_error=1")),
    "SD1 textual inversion": ("sd1", ("method={kind: textual_inversion}", "optim.lr=1e-2")),
    "SDXL pivotal tuning": ("sdxl", ("method={kind: pivotal}",)),
}  # fmt: skip


def demo(where: Where) -> Iterator[Row]:
    """Runs the demo, and lets the judge rate what was learned (as tests/jobs/test_demo.py does)."""
    sys.path.insert(0, str(ROOT / "examples" / "tiny_base"))
    import judge
    from looks import DEMO, SUBJECTS
    from PIL import Image

    from finetune import load_recipe, train
    from finetune.jobs.demo import demo_images

    short = (
        ["run.steps=2", "prior.count=2", "prior.others=null", "prior.steps=2", "sample.steps=2", "sample.count=1"]
        if where.tiny
        else []
    )
    began = time.perf_counter()
    run = train(load_recipe("demo", [f"data.photos={demo_images()}", *short]), where.work / "demo")
    yield check("demo: from photos to page", (run / "report.html").is_file(), f"{time.perf_counter() - began:.0f} s")
    known = judge.load_judge()

    def images(when: str, prompt: int) -> list[Image.Image]:
        return [Image.open(file).convert("RGB") for file in (run / "samples" / when).glob(f"{prompt:02d}-*.png")]

    for what, when, prompt, least, most in (
        ("before, the token draws the mug", "before", 0, 0.0, 0.0),
        ("afterwards it draws the mug", "after", 0, 0.75, 1.0),
        ('"a mug" draws that mug', "after", 3, 0.0, 0.25),
    ):
        found = judge.is_subject(known, images(when, prompt), SUBJECTS[DEMO])
        share = sum(found) / len(found)
        yield check(f"demo: {what}", where.tiny or least <= share <= most, f"{share:.2f} ({least:g} to {most:g})")


def numbers(where: Where) -> Iterator[Row]:
    """Compares loss and gradient of one step of every family in every precision with those of the CPU in fp32. The
    error may be twice the CPU's error in the same precision."""
    from finetune.families.registry import FAMILIES

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for family in FAMILIES:
        for kind in ("lora", "full"):
            wanted = loss_and_gradient(tiny_base(where, family), kind, torch.device("cpu"), "fp32")
            for precision in PRECISIONS:
                yield attempt(
                    f"{family} {kind} {precision}: gradient",
                    partial(compared, where, family, kind, precision, wanted),
                )


def compared(where: Where, family: str, kind: str, precision: str, wanted: tuple[float, Tensor]) -> str:
    base = tiny_base(where, family)
    loss, error = off(loss_and_gradient(base, kind, where.device, precision), wanted)
    cpu_loss, cpu_error = off(loss_and_gradient(base, kind, torch.device("cpu"), precision), wanted)
    line = f"gradient {error:.1e} off (CPU {cpu_error:.1e}), loss {loss:.1e} (CPU {cpu_loss:.1e})"
    if not error <= 2 * cpu_error + EXACT:
        raise ValueError(line)
    return line


def off(found: tuple[float, Tensor], wanted: tuple[float, Tensor]) -> tuple[float, float]:
    """Relative errors of a loss and of a gradient."""
    return abs(found[0] - wanted[0]) / wanted[0], float((found[1] - wanted[1]).norm() / wanted[1].norm())


def loss_and_gradient(base: Path, kind: str, device: torch.device, precision: str) -> tuple[float, Tensor]:
    """Loss and gradient of `Step` for one fixed batch. An adapter's base is cast; full training uses autocast."""
    from finetune.core.devices import DTYPES
    from finetune.families.source import load_family
    from finetune.methods.registry import METHODS
    from finetune.objectives.registry import build_objective
    from finetune.objectives.settings import ObjectiveSettings
    from finetune.training.step import Step

    method = METHODS[kind](kind=kind)
    dtype = DTYPES[precision]
    family = load_family(str(base), dtype=method.weight_dtype(dtype))
    family.parts.to(device)
    trained = method.attach(family, 0)
    made = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trained.items():
            if ".lora_B." in name:  # B starts at 0, and then A has no gradient
                parameter.copy_(torch.randn(parameter.shape, generator=made) * 0.02)
    objective = build_objective(ObjectiveSettings(), family.schedule, family.shift(32)).to(device)
    step = Step(family, list(method.part_names(family)), objective, family.encode_prompts)
    autocast = precision == "fp16" or (precision == "bf16" and not method.is_adapter)
    with torch.autocast(device.type, dtype if autocast else torch.bfloat16, enabled=autocast):
        loss = step(fixed_batch(family.codec.channels).to(device))
    (loss * SCALE).backward()
    gradient = torch.cat([p.grad.float().flatten().cpu() for p in trained.values() if p.grad is not None])
    return float(loss), gradient / SCALE


def fixed_batch(channels: int, count: int = 2) -> Any:
    from finetune.core.batch import Batch, Geometry, Latents
    from finetune.core.rng import SampleKey

    mean = torch.randn(count, channels, 16, 16, generator=torch.Generator().manual_seed(1))
    geometry, draws = [Geometry((32, 32), (0, 0), (32, 32))] * count, [SampleKey(0, 0, k) for k in range(count)]
    prompts = ["a photo of zwx mug", "a mug"][:count]
    return Batch(
        Latents(mean, torch.full_like(mean, 0.1)), prompts, torch.ones(count), geometry, draws, ["a", "b"][:count]
    )


def resume(where: Where) -> Iterator[Row]:
    """Deterministic mode: a run that stops half-way and resumes in a new process equals the uninterrupted run."""
    started = {}
    for what, (family, overrides) in RESUMED.items():
        precision = [f"run.precision={where.precision('fp16')}"] if "run.precision=fp16" in overrides else []
        settings = (*overrides, *precision, "run.steps=6", "run.checkpoint_every=3", "run.deterministic=true")
        name = re.sub(r"\W+", "-", what)
        yield attempt(where.label(f"deterministic run: {what}"), partial(half, where, name, family, settings))
        if (where.work / f"{name}-again").is_dir():
            command = [sys.executable, "-m", "finetune", "resume", str(where.work / f"{name}-again")]
            started[what] = (
                name,
                subprocess.Popen(
                    command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()
                ),
            )
    for what, (name, process) in started.items():
        _, said = process.communicate()
        again, whole = (trained_bytes(where.work / (name + suffix)) for suffix in ("-again", ""))
        equal = process.returncode == 0 and again == whole
        yield check(
            where.label(f"resumed bit for bit: {what}"), equal, "" if equal else said.strip()[-300:] or "other weights"
        )


def half(where: Where, name: str, family: str, settings: tuple[str, ...]) -> str:
    """Trains, and also keeps a copy of the run folder from half-way."""
    from finetune import train

    run, again = where.work / name, where.work / f"{name}-again"
    train(tiny_recipe(where, family, settings), run)
    shutil.copytree(run, again)
    for late in ("checkpoints/step-000006", "adapter", "exports", "samples/after"):
        shutil.rmtree(again / late)
    return ""


def trained_bytes(run: Path) -> bytes:
    file = run / "adapter" / "trained.safetensors"
    return file.read_bytes() if file.is_file() else run.name.encode()


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")  # tests/conftest.py hides GPUs unless they are asked for
    return os.environ | {"PYTHONPATH": path, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "CUDA_VISIBLE_DEVICES": visible}


def jobs(where: Where) -> Iterator[Row]:
    """Runs complete jobs on small random bases, from photos to verified exports, and then the commands."""
    for what, (family, overrides) in JOBS.items():
        settings = tuple(text.replace("fp16", where.precision("fp16")) for text in overrides)
        yield attempt(where.label(f"job: {what}"), partial(whole_job, where, what, family, settings))
    run = where.work / folder_of(next(iter(JOBS)))
    if run.is_dir():
        file = next(run.glob("exports/*.safetensors"))
        for arguments in (["sample", str(run), "-p", "a photo of a mug", "--count", "1"], ["verify", str(file)]):
            base = ["--base", str(tiny_base(where, "sdxl"))] if arguments[0] == "verify" else []
            command = [sys.executable, "-m", "finetune", *arguments, *base]
            done = subprocess.run(command, cwd=where.work, env=environment(), capture_output=True, text=True)
            yield check(f"finetune {arguments[0]}", done.returncode == 0, done.stderr.strip()[-300:])


def folder_of(what: str) -> str:
    return "job-" + re.sub(r"\W+", "-", what)


def whole_job(where: Where, what: str, family: str, settings: tuple[str, ...]) -> str:
    from finetune import train

    began = time.perf_counter()
    run = train(tiny_recipe(where, family, settings), where.work / folder_of(what))
    exported = json.loads((run / "exports.json").read_text(encoding="utf-8"))
    if "sample.every=1" in settings and not (run / "samples" / "step-000001").is_dir():
        raise ValueError("no preview was drawn")
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if not all(map(math.isfinite, losses)):
        raise ValueError(f"losses {losses}")
    return f"{time.perf_counter() - began:.0f} s, exports {', '.join(item['format'] for item in exported)}"


def stops(where: Where) -> Iterator[Row]:
    """A step with a loss that is not finite does not update the weights, in any precision."""
    for precision in ("fp32", "bf16", "fp16"):
        for kind in ("lora", "full"):
            chosen = where.precision(precision)
            yield attempt(
                where.label(f"stop at NaN: {kind} {precision}"), partial(stopped_at_nan, where, kind, chosen)
            )


def stopped_at_nan(where: Where, kind: str, precision: str) -> str:
    from finetune.core.devices import DTYPES
    from finetune.core.errors import CheckFailed
    from finetune.families.source import load_family
    from finetune.methods.registry import METHODS
    from finetune.objectives.registry import build_objective
    from finetune.objectives.settings import ObjectiveSettings
    from finetune.optim.adamw import AdamW
    from finetune.training.accelerate import make_accelerator
    from finetune.training.checkpoint import Checkpoints
    from finetune.training.settings import Run
    from finetune.training.step import Step, parts_of
    from finetune.training.trainer import Trainable, Trainer

    method = METHODS[kind](kind=kind)
    run = Run(steps=3, precision=precision)
    family = load_family(str(tiny_base(where, "sd1")), dtype=method.weight_dtype(DTYPES[precision]))
    family.parts.to(where.device)
    trained = method.attach(family, 0)
    before: dict[str, Tensor] = {}

    class Spoiled:
        def micro(self, step: int, index: int) -> Any:
            batch = fixed_batch(family.codec.channels)
            if step >= 1:  # a later step is under way when this one is read, and a loss scaler would take a good one
                batch.latents.mean.fill_(math.nan)
            return batch

    def after(step: int) -> None:
        if step == 1:  # batches are made ahead, in a thread: what they saw would be other weights
            before.update({name: value.detach().clone() for name, value in trained.items()})

    folder = where.work / f"nan-{kind}-{precision}"
    folder.mkdir(exist_ok=True)
    objective = build_objective(ObjectiveSettings(), family.schedule)
    trainer = Trainer(
        Step(family, parts_of(trained), objective, family.encode_prompts),
        Trainable(trained),
        AdamW(lr=1e-3),
        run,
        make_accelerator(run, method.is_adapter),
        Checkpoints(folder),
    )
    try:
        trainer.fit(Spoiled(), after)
    except CheckFailed as stop:
        if all(torch.equal(before[name], value) for name, value in trained.items()):
            return str(stop).split(";")[0]
        raise ValueError("the weights were updated with NaN") from stop
    finally:
        forget()
    raise ValueError("the run did not stop")


def tests(where: Where) -> Iterator[Row]:
    """`pytest -m gpu`: every family x method on the device."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    if where.tiny:
        command += ["--collect-only"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]]
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            yield check(line[:300], False)
    yield check("pytest -m gpu", done.returncode == 0, lines[-1])

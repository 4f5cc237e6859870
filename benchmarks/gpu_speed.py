"""The parts of benchmarks/gpu.py that measure speed and memory: steps, kernels, start-up, checkpoints.

Every case is measured in three ways with the same weights: our loop with our batches; a bare loop (forward, loss,
backward and optimiser, with all tensors on the device) that calls the denoiser with the same inputs as our loop; and
the bare loop with forward and backward as a CUDA graph. Times are medians of device events after warm-up.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_common import Part, Row, Where, forget, tiny_base
from gpu_correctness import ROOT, environment
from torch import Tensor

GIB = 2**30
WARM, STEPS, ENOUGH = 4, 10, 4.0  # steps before the measured ones, measured ones, seconds after which fewer will do
BASES = {"SD 1.5": "sd1", "SDXL": "sdxl", "SD3.5 medium": "sd3", "Flux.1 dev": "flux"}
SIDES, BATCHES = (512, 1024), (1, 8)
RANK = 16


class Enough(Exception):
    """Ends the loop when it has been measured."""


def device(where: Where) -> Iterator[Row]:
    """The best speed of this device, for a large matrix product and a large copy."""
    size = 64 if where.tiny else 8192
    a, b = (torch.randn(size, size, device=where.device, dtype=torch.bfloat16) for _ in range(2))
    copied = torch.empty(size * size * (1 if where.tiny else 16), device=where.device, dtype=torch.bfloat16)
    product = timed(where, lambda: a @ b)
    copy = timed(where, copied.clone)
    yield {
        "table": "device",
        "what": "a bf16 product and a copy",
        "tflops": 2 * size**3 / product / 1e9,
        "gb_per_s": 2 * copied.numel() * 2 / copy / 1e6,
    }


def timed(where: Where, work: Callable[[], Any], warm: int = WARM, steps: int = STEPS) -> float:
    """The median time in milliseconds, from device events (on a CPU from the clock)."""
    clock = Clock(where)
    for _ in range(warm + steps):
        clock.mark()
        work()
    clock.mark()
    return statistics.median(clock.milliseconds()[warm:])


class Clock:
    """Records times on the device."""

    def __init__(self, where: Where) -> None:
        self.cuda = where.device.type == "cuda"
        self.moments: list[Any] = []

    def mark(self) -> None:
        if not self.cuda:
            self.moments.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.moments.append(event)

    def milliseconds(self) -> list[float]:
        pairs = itertools.pairwise(self.moments)
        if not self.cuda:
            return [(after - before) * 1000 for before, after in pairs]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in pairs]


@dataclass
class Case:
    """One family with a method attached. `side` (pixels) and `batch` are those of the current case."""

    where: Where
    family: Any
    method: Any
    trained: dict[str, torch.nn.Parameter]
    prompts: Any
    optim: Any
    dtype: torch.dtype
    side: int = 0
    batch: int = 0
    saving: list[float] = field(default_factory=list)

    @property
    def autocast(self) -> Any:
        full = not self.method.is_adapter and self.dtype != torch.float32
        dtype = self.dtype if full else torch.bfloat16
        return torch.autocast(self.where.device.type, dtype, enabled=full, cache_enabled=False)

    def micro(self, step: int, index: int) -> Any:
        """A batch as from the data plan: cached latents and their random keys, on the CPU."""
        from finetune.core.batch import Batch, Geometry, Latents
        from finetune.core.rng import SampleKey

        latent = self.side // self.family.codec.factor
        mean = torch.zeros(self.batch, self.family.codec.channels, latent, latent)
        square = (self.side, self.side)
        return Batch(
            Latents(mean, torch.ones_like(mean)),
            ["a photo of zwx mug"] * self.batch,
            torch.ones(self.batch),
            [Geometry(square, (0, 0), square)] * self.batch,
            [SampleKey(0, step, slot) for slot in range(self.batch)],
            ["photo.png"] * self.batch,
        )


def prepared(where: Where, base: str, kind: str) -> Case:
    """A base with random weights on the device, with the method attached, the prompts encoded and the text encoders
    released."""
    from finetune.data.cache import PromptCache
    from finetune.families.source import load_family
    from finetune.methods.registry import METHODS
    from finetune.optim.adamw import AdamW
    from finetune.optim.adamw8bit import AdamW8bit
    from finetune.testing import published
    from finetune.testing.random_base import make_parts, random_family

    method = METHODS[kind](**({"rank": RANK} if kind == "lora" else {}))
    dtype = torch.float32 if where.tiny else torch.bfloat16
    if where.tiny:
        family = load_family(str(tiny_base(where, BASES[base])))
        family.parts.to(where.device)
    else:
        folder = published.write(base, where.work / "base")
        encoders = [part for part in published.PUBLISHED[base][2] if part.startswith("text_encoder")]
        family = random_family(folder, dtype, where.device, encoders)
    prompts = PromptCache(family, base, where.work / "cache", dtype)
    prompts.fill(["a photo of zwx mug"])
    family.parts.release([part for part in family.parts if part != "denoiser"])
    if not where.tiny:
        make_parts(family, method.weight_dtype(dtype), ["denoiser"])
    family.parts.place(["denoiser"])
    trained = method.attach(family, 0)
    optim = AdamW() if kind == "lora" else AdamW8bit()
    return Case(where, family, method, trained, prompts, optim, dtype)


def speed(base: str, kind: str, where: Where) -> Iterator[Row]:
    """One row for each size and batch. A row notes if the case does not fit in memory."""
    case = prepared(where, base, kind)
    for side, batch in [(32, 1)] if where.tiny else itertools.product(SIDES, BATCHES):
        case.side, case.batch = side, batch
        row: Row = {"table": "speed", "what": f"{base}, {kind}, {side} px, batch {batch}"}
        try:
            yield row | one_case(case, base, kind)
        except torch.OutOfMemoryError:
            yield row | {"note": "out of memory"}
        case.family.parts["denoiser"].zero_grad(set_to_none=True)
        forget()


def one_case(case: Case, base: str, kind: str) -> Row:
    planned, checkpointed = plan_of(case, base, kind)
    found: Row = {"plan_gib": planned, "checkpointing": checkpointed}
    if not case.where.tiny and planned * GIB > 0.95 * torch.cuda.get_device_properties(0).total_memory:
        return found | {"note": "not run: it does not fit, according to the plan"}
    found |= our_loop(case)
    forget()
    bare = bare_step(case)
    found["flops"] = counted(bare)
    found["bare_ms"] = timed(case.where, bare, *few(found["ours_ms"]))
    found |= graphed(case)
    first = case.side == SIDES[0] and case.batch == BATCHES[0]
    return found | (profiled(case) if first or case.where.tiny else {})


def few(milliseconds: float) -> tuple[int, int]:
    """The number of warm-up and of measured steps, for steps of this length."""
    return (WARM, STEPS) if milliseconds < 400 else (2, 3)


def plan_of(case: Case, base: str, kind: str) -> tuple[float, bool]:
    """The estimate of `finetune plan` in GiB, and whether the case fits. Switches gradient checkpointing on if the
    plan needs it; later cases keep it."""
    from finetune.config.load import parse_recipe
    from finetune.jobs.estimate import estimate

    recipe = parse_recipe(
        {
            "base": str(case.family.folder),
            "data": {"photos": "photos", "class_noun": "mug", "resolution": case.side},
            "method": {"kind": kind} | ({"rank": RANK} if kind == "lora" else {}),
            "optim": {"kind": case.optim.kind},
            "run": {"batch_size": case.batch, "precision": "fp32" if case.where.tiny else "bf16"},
        }
    )
    checkpointed = bool(getattr(case.family.parts["denoiser"], "is_gradient_checkpointing", False))
    planned = estimate(recipe, checkpointing=checkpointed).total
    if not case.where.tiny and not checkpointed:
        whole = torch.cuda.get_device_properties(0).total_memory
        if planned > 0.9 * whole:
            case.family.enable_gradient_checkpointing(["denoiser"])
            return estimate(recipe, checkpointing=True).total / GIB, True
    return planned / GIB, checkpointed


def our_loop(case: Case, on_step: Callable[[int], None] = lambda step: None) -> Row:
    """Runs `Trainer.fit` as a job does: median ms of a step, peak memory, and the time of a LoRA's checkpoint."""
    from finetune.core.events import sent_to
    from finetune.objectives.registry import build_objective
    from finetune.objectives.settings import ObjectiveSettings
    from finetune.runs.metrics import MetricsFile
    from finetune.training.accelerate import make_accelerator
    from finetune.training.settings import Run
    from finetune.training.step import Step, parts_of
    from finetune.training.trainer import Trainable, Trainer

    clock, began = Clock(case.where), [0.0]

    def after(step: int) -> None:
        clock.mark()
        if step == WARM:
            began[0] = time.perf_counter()
        if step >= WARM + 3 and time.perf_counter() - began[0] > ENOUGH:
            raise Enough
        on_step(step)

    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[case.dtype]
    run = Run(steps=WARM + STEPS + 1, batch_size=case.batch, checkpoint_every=10**6, keep=1, precision=precision)
    if case.where.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    objective = build_objective(ObjectiveSettings(), case.family.schedule, case.family.shift(case.side))
    trainer = Trainer(
        Step(case.family, parts_of(case.trained), objective, case.prompts),
        Trainable(case.trained),
        case.optim,
        run,
        make_accelerator(run, case.method.is_adapter),
        timed_checkpoints(case),
    )
    with suppress(Enough), sent_to(MetricsFile(case.where.work / "run")):
        trainer.fit(case, after)
    found: Row = {"ours_ms": statistics.median(clock.milliseconds()[WARM:])}
    if case.where.device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    if case.saving:
        found["checkpoint_s"] = case.saving[-1]
    return found


def timed_checkpoints(case: Case) -> Any:
    """Checkpoints that record their time. Those of whole models are not written, since they would fill the disk."""
    from finetune.training.checkpoint import Checkpoints, State

    class Timed(Checkpoints):
        def check_space(self, needed: int) -> None:
            """Checks nothing: the checkpoints of whole models, which would not fit, are not written."""

        def save(self, state: State, keep: int) -> Path:
            if not case.method.is_adapter:
                return self.path
            began = time.perf_counter()
            path = super().save(state, keep)
            case.saving.append(time.perf_counter() - began)
            return path

    run = case.where.work / "run"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    return Timed(run)


def bare_step(case: Case) -> Callable[[], None]:
    """A function for one bare step: forward, loss, backward and optimiser."""
    pass_once = forward_backward(case)
    optimizer = case.optim.build(case.trained)

    def step() -> None:
        pass_once()
        optimizer.step()
        optimizer.zero_grad()

    return step


def forward_backward(case: Case) -> Callable[[], None]:
    """A function for forward and backward of the denoiser with our loop's inputs and a fixed target."""
    arguments, named = given_to_denoiser(case)
    denoiser = case.family.parts["denoiser"].train()
    target: list[Tensor] = []

    def run() -> None:
        with case.autocast:
            out = denoiser(*arguments, **named)[0]
        if not target:
            target.append(torch.randn_like(out.float()))
        (out.float() - target[0]).square().mean().backward()

    return run


@torch.no_grad()
def given_to_denoiser(case: Case) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with which `Family.predict` calls the denoiser, on the device."""
    seen: list[Any] = []
    denoiser = case.family.parts["denoiser"]
    handle = denoiser.register_forward_pre_hook(lambda m, args, named: seen.append((args, named)), with_kwargs=True)
    batch = case.micro(0, 0).to(case.where.device)
    t = torch.linspace(100, 900, case.batch, device=case.where.device)
    noisy = torch.randn_like(batch.latents.mean)
    with case.autocast:
        case.family.predict(noisy, t, case.prompts(batch.prompts), batch.geometry)
    handle.remove()
    return seen[0]


def counted(step: Callable[[], None]) -> int:
    """The floating-point operations of a step in products, convolutions and attention."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def graphed(case: Case) -> Row:
    """Measures the bare loop with forward and backward as one CUDA graph and an ordinary optimiser step."""
    if case.where.device.type != "cuda":
        return {"graph_ms": None}
    pass_once = forward_backward(case)
    optimizer = case.optim.build(case.trained)
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                pass_once()
                optimizer.zero_grad()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            pass_once()
    except torch.OutOfMemoryError:
        return {"graph_ms": None, "graph_note": "out of memory"}
    except RuntimeError as error:
        return {"graph_ms": None, "graph_note": str(error).splitlines()[0][:200]}

    def step() -> None:
        graph.replay()  # it overwrites the same gradients each time, so nothing is zeroed
        optimizer.step()

    return {"graph_ms": timed(case.where, step, 2, STEPS)}


def profiled(case: Case) -> Row:
    """Kernels, copies and waits of one step of our loop, and the host's time without its waits."""
    from torch.profiler import ProfilerActivity, profile

    steps, cuda = 3, case.where.device.type == "cuda"
    profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])])
    began = [0.0]

    def on_step(step: int) -> None:
        if step == WARM:
            profiler.start()
            began[0] = time.perf_counter()
        if step == WARM + steps:
            began[0] = time.perf_counter() - began[0]
            profiler.stop()
            raise Enough

    our_loop(case, on_step)
    return summary(profiler, steps, began[0])


def summary(profiler: Any, steps: int, seconds: float) -> Row:
    events = profiler.events()
    on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    waits = [event for event in events if event.name.startswith("cuda") and "Synchronize" in event.name]
    copies = [event.name for event in on_device if event.name.startswith("Memcpy")]
    kernels = [event for event in on_device if not event.name.startswith(("Memcpy", "Memset"))]
    waited = sum(event.cpu_time_total for event in waits) / 1000
    return {
        "kernels": len(kernels) / steps,
        "waits": len(waits) / steps,
        "copies_to_device": sum("HtoD" in name for name in copies) / steps,
        "copies_to_host": sum("DtoH" in name for name in copies) / steps,
        "kernels_ms": sum(event.device_time_total for event in kernels) / 1000 / steps,
        "host_ms": (seconds * 1000 - waited) / steps,
        "operators": sum(event.name.startswith("aten::") for event in events) / steps,
    }


def start(where: Where) -> Iterator[Row]:
    """Measures the seconds from the command to the end of its first step, on the tiny base with cold and warm
    caches."""
    for caches in ("cold", "warm"):
        run = where.work / f"start-{caches}"
        short = ["run.steps=1", "prior.kind=none", "sample.count=1", "sample.steps=1", f"run.dir={run}"]
        photos = ROOT / "examples" / "subject_mug"
        command = [sys.executable, "-m", "finetune", "train", "demo", f"data.photos={photos}", *short]
        env = environment() | {"FINETUNE_CACHE": str(where.work / "start-cache")}
        began = time.perf_counter()
        with (where.work / "start.log").open("w", encoding="utf-8", newline="\n") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
            seconds = first_line(run / "metrics.jsonl", process) - began
            process.wait()
        ok = process.returncode == 0
        note = "" if ok else (where.work / "start.log").read_text(encoding="utf-8")[-300:]
        yield {
            "table": "start",
            "what": f"tiny base, {caches} caches",
            "first_step_s": seconds,
            "ok": ok,
            "note": note,
        }


def first_line(file: Path, process: subprocess.Popen[bytes]) -> float:
    """The time at which the file has its first complete line."""
    while process.poll() is None and not (file.is_file() and file.read_bytes().endswith(b"\n")):
        time.sleep(0.02)
    return time.perf_counter()


SPEED = [
    Part(f"speed-{BASES[base]}-{kind}", seconds, partial(speed, base, kind))
    for base, kind, seconds in (
        ("SD 1.5", "lora", 50), ("SDXL", "lora", 70), ("Flux.1 dev", "lora", 80), ("SD3.5 medium", "lora", 60),
        ("SD 1.5", "full", 45), ("SDXL", "full", 70), ("SD3.5 medium", "full", 60),
    )
]  # fmt: skip

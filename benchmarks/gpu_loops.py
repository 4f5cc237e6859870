"""The loops that benchmarks/gpu_speed.py measures: ours, a bare one, and the bare one as a CUDA graph.

Every case is measured in three ways with the same weights: our loop with our batches; a bare loop (forward, loss,
backward and optimiser, with all tensors on the device) that calls the denoiser with the same inputs as our loop; and
the bare loop with forward and backward as a CUDA graph. Times are medians of device events after warm-up.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_common import Row, Where
from torch import Tensor

GIB = 2**30
WARM, STEPS, ENOUGH = 4, 10, 4.0  # steps before the measured ones, measured ones, seconds after which fewer will do


class Enough(Exception):
    """Ends the loop when it has been measured."""


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
    """One family with a method attached. `side` (pixels), `batch` and `settings` are those of the current case."""

    where: Where
    family: Any
    method: Any
    trained: dict[str, torch.nn.Parameter]
    prompts: Any
    optim: Any
    dtype: torch.dtype
    weights: str = "fp32"  # of what is trained: `run.weights`
    side: int = 0
    batch: int = 0
    saving: list[float] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)  # of `run`, in our loop

    @property
    def autocast(self) -> Any:
        full = not self.method.is_adapter and self.dtype != torch.float32 and self.weights == "fp32"
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


def our_loop(case: Case, on_step: Callable[[int], None] = lambda step: None) -> Row:
    """Runs `Trainer.fit` as a job does: median ms of a step, peak memory, and the time of a LoRA's checkpoint."""
    from finetune.core.events import sent_to
    from finetune.objectives.registry import build_objective
    from finetune.objectives.settings import ObjectiveSettings
    from finetune.runs.metrics import MetricsFile
    from finetune.training.accelerate import make_accelerator
    from finetune.training.fast import quickened
    from finetune.training.settings import Run
    from finetune.training.step import Step, parts_of
    from finetune.training.trainer import Trainable, Trainer

    clock, began = Clock(case.where), [0.0]

    def after(step: int) -> None:
        clock.mark()
        if step == WARM:
            began[0] = time.perf_counter()
        on_step(step)
        if step >= WARM + 3 and time.perf_counter() - began[0] > ENOUGH:
            raise Enough

    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[case.dtype]
    plain = Run(steps=WARM + STEPS + 1, batch_size=case.batch, checkpoint_every=10**6, keep=1, precision=precision)
    run = plain.model_copy(update={"weights": case.weights, **case.settings})
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
    fused = quickened([case.family.parts["denoiser"]], run.fast == "on", device=case.where.device)
    with suppress(Enough), sent_to(MetricsFile(case.where.work / "run")), fused:
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

    Write = Callable[[Path, State], None]

    class Timed(Checkpoints):
        def check_space(self, needed: int) -> None:
            """Checks nothing: the checkpoints of whole models, which would not fit, are not written."""

        def save(self, state: State, keep: int, write: Write | None = None) -> Path:
            if not case.method.is_adapter:
                return self.path
            began = time.perf_counter()
            path = super().save(state, keep, write)
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
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
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
    return int(counter.get_total_flops())


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
    waits.sort(key=lambda event: event.time_range.start)
    if waits and waits[-1].name == "cudaDeviceSynchronize":
        waits.pop()  # the profiler's own, when it stops: a step waits for a stream or an event
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

"""The parts of benchmarks/gpu.py that measure speed and memory: the device, steps of every base, start-up."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_common import Part, Row, Where, forget, tiny_base
from gpu_correctness import ROOT, environment
from gpu_loops import GIB, STEPS, WARM, Case, bare_step, counted, forward_backward, graphed, our_loop, profiled, timed

BASES = {"SD 1.5": "sd1", "SDXL": "sdxl", "SD3.5 medium": "sd3", "Flux.1 dev": "flux"}
SIDES, BATCHES = (512, 1024), (1, 8)
RANK = 16
HELD = "-bf16"  # of a kind: its trained weights are bf16 too (`run.weights`)


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

    method = METHODS[kind.removesuffix(HELD)](**({"rank": RANK} if kind == "lora" else {}))
    weights = "bf16" if kind.endswith(HELD) else "fp32"
    dtype = torch.float32 if where.tiny and weights == "fp32" else torch.bfloat16
    if where.tiny:
        family = load_family(str(tiny_base(where, BASES[base])), dtype=dtype)
        family.parts.to(where.device)
    else:
        folder = where.work / "base"
        if not folder.is_dir():  # `waits` prepares the same base several times
            published.write(base, folder)
        encoders = [part for part in published.PUBLISHED[base][2] if part.startswith("text_encoder")]
        family = random_family(folder, dtype, where.device, encoders)
    prompts = PromptCache(family, base, where.work / "cache", dtype)
    prompts.fill(["a photo of zwx mug"])
    family.parts.release([part for part in family.parts if part != "denoiser"])
    if weights == "bf16":
        family.trained_dtype = torch.bfloat16
    if not where.tiny:
        make_parts(family, dtype if weights == "bf16" else method.weight_dtype(dtype), ["denoiser"])
    family.parts.place(["denoiser"])
    trained = method.attach(family, 0)
    if weights == "bf16":  # the aim is a GPU of 16 GB, whatever this one has
        family.enable_gradient_checkpointing(["denoiser"])
    optim = AdamW() if kind == "lora" else AdamW8bit()
    return Case(where, family, method, trained, prompts, optim, dtype, weights)


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
    found["flops"] = flops_of(case)
    found["bare_ms"] = timed(case.where, bare_step(case), *few(found["ours_ms"]))
    found |= graphed(case)
    first = case.side == SIDES[0] and case.batch == BATCHES[0]
    return found | (profiled(case) if first or case.where.tiny else {})


def flops_of(case: Case) -> int:
    """The operations of a step, without what gradient checkpointing computes a second time. One image is counted:
    every product grows with the batch."""
    denoiser: Any = case.family.parts["denoiser"]
    checkpointed, batch = denoiser.is_gradient_checkpointing, case.batch
    case.batch = 1
    if checkpointed:
        denoiser.disable_gradient_checkpointing()
    try:
        return batch * counted(forward_backward(case))
    finally:
        case.batch = batch
        denoiser.zero_grad(set_to_none=True)
        if checkpointed:
            case.family.enable_gradient_checkpointing(["denoiser"])


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
            "method": {"kind": kind.removesuffix(HELD)} | ({"rank": RANK} if kind == "lora" else {}),
            "optim": {"kind": case.optim.kind},
            "run": {
                "batch_size": case.batch,
                "precision": "fp32" if case.dtype == torch.float32 else "bf16",
                "weights": case.weights,
            },
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
        ("SDXL", "full-bf16", 70),
    )
]  # fmt: skip

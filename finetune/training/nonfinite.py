"""Saves the batch of a step with a NaN or infinite loss, so that the user can inspect it and repeat the step."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.core.batch import Batch
from finetune.core.files import save_tensors, write_json
from finetune.training.readings import BadStep

Samples = list[tuple[dict[str, Any], dict[str, Tensor]]]


def describe_samples(batches: Sequence[Batch], timesteps: Sequence[Tensor]) -> Samples:
    """One entry for each sample: facts about it, and its latents (mean and std, [C, h, w])."""
    found: Samples = []
    for batch, t in zip(batches, timesteps, strict=True):
        for index, name in enumerate(batch.names):
            about = {
                "name": name,
                "timestep": float(t[index]),
                "sample": batch.keys[index].sample,
                "prompt": batch.prompts[index],
                "weight": float(batch.weight[index]),
            }
            tensors = {"mean": batch.latents.mean[index], "std": batch.latents.std[index]}
            if batch.mask is not None:
                tensors["mask"] = batch.mask[index]
            if batch.extra is not None:
                tensors["extra"] = batch.extra[index]
            found.append((about, {key: value.detach().cpu() for key, value in tensors.items()}))
    return found


def bundle_folder(run: Path, step: int) -> Path:
    return run / f"bad-step-{step:06d}"


def write_bundle(folder: Path, bad: BadStep, samples: Samples) -> None:
    """Writes RUN/bad-step-000012/{step.json,latents.safetensors}, and replaces an older bundle of the same step."""
    shutil.rmtree(folder, ignore_errors=True)
    numbers = {"loss": bad.loss, "grad_norm": bad.norm}
    facts = {
        "step": bad.step,
        **{key: value if value is None or math.isfinite(value) else str(value) for key, value in numbers.items()},
        "again": f"finetune resume {folder.parent.as_posix()}",
        "samples": [about for about, _ in samples],
    }
    write_json(folder / "step.json", facts)
    tensors = {f"{about['sample']:04d}.{key}": value for about, held in samples for key, value in held.items()}
    save_tensors(folder / "latents.safetensors", tensors)


def sentence(samples: Samples, bundle: Path, bad: BadStep, skipped: bool) -> str:
    """`skipped`: the step was not applied; else its weights were only in memory."""
    what = f"gradient norm {bad.norm}" if math.isfinite(bad.loss) else f"loss {bad.loss}"
    where = ", ".join(f"{about['name']} (timestep {about['timestep']:g})" for about, _ in samples)
    kept = "the weights were not updated" if skipped else "nothing of it was saved"
    return (
        f"step {bad.step} is not finite ({what}) on {where}; {kept} and the last checkpoint is intact: "
        f"lower optim.lr, or check these images (the batch is in {bundle})"
    )


def none_taken(steps: int) -> str:
    """What the user is told of a run whose steps were all skipped by the loss scaler."""
    what = "the only step changed no weight" if steps == 1 else f"none of the {steps} steps changed a weight"
    return (
        f"{what}, because with fp16 no gradient was finite: raise run.steps, as each skipped step lowers the loss "
        "scale, or start a new run with run.precision=fp32"
    )


def many_skipped(skipped: int, steps: int) -> str:
    """What the user is told of a run of which the loss scaler skipped more than it needs to find its scale."""
    return (
        f"{skipped} of the {steps} steps changed no weight, because with fp16 their gradients were not finite: give "
        f"{skipped} more run.steps, or start a new run with run.precision=fp32"
    )

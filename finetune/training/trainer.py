"""The only training loop. One batch can be read straight through, from latents to the stepped optimiser."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from finetune.core.batch import Batch
from finetune.core.errors import CheckFailed
from finetune.core.progress import phase
from finetune.core.signals import Interrupted, Signals
from finetune.families.base import Family
from finetune.objectives.base import Objective
from finetune.optim.base import Window
from finetune.optim.registry import Optim
from finetune.optim.state import load_state_tensors, state_tensors
from finetune.runs.folder import RunFolder
from finetune.training import nonfinite
from finetune.training.checkpoint import State, clone, to_cpu
from finetune.training.ema import update_ema
from finetune.training.regularizers import Regularizer
from finetune.training.settings import Run
from finetune.training.step import MicroBatches, PromptEncoder, Step


def fit(
    *,
    accelerator: Accelerator,
    family: Family,
    trained: dict[str, nn.Parameter],
    objective: Objective,
    encode_prompts: PromptEncoder,
    batches: MicroBatches,
    optim: Optim,
    run: Run,
    folder: RunFolder,
    stratify: int | None = None,
    encoder_dropout: float = 0.0,
    windows: Mapping[str, Window] | None = None,
    regularizers: Sequence[Regularizer] = (),
    on_step: Callable[[int], None] | None = None,
    signals: Signals | None = None,
) -> None:
    """Trains from the newest checkpoint (or from the start) to `run.steps`, and leaves the EMA, where one is
    asked for, in the trained parameters.

    Args:
        trained: name -> fp32 parameter, as `Method.attach` gave them.
        stratify: the number of samples in a global batch, to stratify their timesteps; None draws uniformly.
        encoder_dropout: the probability with which each text encoder's output is zeroed.
        windows: name -> the share of the run in which it is trained; None, or a name left out: all of it.
        penalties: what is added to the loss of every micro-batch.
        on_step: called on every process after step n (1-based), for previews.

    Raises:
        CheckFailed: a loss or gradient that is not finite; the update is not made.
        Interrupted: SIGINT or SIGTERM; the step was finished and its checkpoint written.
    """
    signals = signals or Signals()
    step = Step(
        family, _parts_of(trained), objective.to(accelerator.device), encode_prompts, encoder_dropout, regularizers
    )
    step.stratify = stratify
    step.to(accelerator.device)  # before the optimiser: its state is made where its parameters are
    optimizer = optim.build(trained, windows)
    model, optimizer = accelerator.prepare(step, optimizer)
    start, ema = _restore(accelerator, folder, trained, optimizer, run)
    if accelerator.is_main_process:
        folder.check_space(_checkpoint_bytes(trained, run) * (run.keep + 1))
    model.train()
    parameters = list(trained.values())
    with phase("Training", run.steps) as advance, signals.deferred():
        advance(start, "")
        for n in range(start, run.steps):
            began = time.perf_counter()
            lr = optim.set_lr(optimizer, n, run.steps)
            loss, norm = _update(accelerator, model, optimizer, parameters, batches, n, run, folder, optim)
            update_ema(ema, trained, run.ema, n)
            _log(accelerator, folder, run, n + 1, loss, norm, lr, time.perf_counter() - began, advance)
            stop = _all_reduce_max(accelerator, signals.received or 0)
            due = (n + 1) % run.checkpoint_every == 0 or n + 1 == run.steps
            if (due or stop) and accelerator.is_main_process:
                folder.save(_state(n + 1, trained, optimizer, ema, accelerator), run.keep)
            if stop:
                accelerator.wait_for_everyone()  # whoever started us ends the others when one of us ends
                raise Interrupted(stop)
            if on_step is not None:
                on_step(n + 1)
    accelerator.wait_for_everyone()
    _copy_into(trained, ema)
    accelerator.free_memory()  # it holds on to the model and the optimiser


def _update(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    batches: MicroBatches,
    n: int,
    run: Run,
    folder: RunFolder,
    optim: Optim,
) -> tuple[Tensor, Tensor | None]:
    """One optimiser step from its micro-batches: their mean loss, and the gradient's norm before clipping."""
    loss = torch.zeros((), device=accelerator.device)
    norm, seen = None, []
    for index in range(run.accumulate):
        batch = batches.micro(n, index).to(accelerator.device)
        seen.append(batch)
        with accelerator.accumulate(model):
            micro_loss = model(batch)
            accelerator.backward(micro_loss)
            loss += micro_loss.detach() / run.accumulate
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(parameters, optim.max_grad_norm or math.inf)
                _check_finite(accelerator, model, folder, n, loss, norm, seen)
            optimizer.step()
            optimizer.zero_grad()
    return loss, norm


def _all_reduce_max(accelerator: Accelerator, own: int) -> int:
    """The largest of the processes' numbers: what one of them has met, all of them act upon in the same step."""
    if accelerator.num_processes == 1:
        return own
    return int(accelerator.gather(torch.tensor([own], device=accelerator.device)).max())


def _parts_of(trained: dict[str, nn.Parameter]) -> list[str]:
    return list(dict.fromkeys(name.split(".", 1)[0] for name in trained))


def _restore(
    accelerator: Accelerator,
    folder: RunFolder,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    run: Run,
) -> tuple[int, dict[str, Tensor]]:
    """The step to start at, and the EMA; the newest valid checkpoint's state where there is one."""
    state = folder.latest()
    if accelerator.is_main_process:
        folder.rewind_metrics(state.step if state else 0)
    if state is None:
        return 0, clone(trained) if run.ema else {}
    _copy_into(trained, state.trained)
    load_state_tensors(optimizer, state.optimizer, state.values.get("optimizer", {}))
    if accelerator.scaler is not None and "scaler" in state.values:
        accelerator.scaler.load_state_dict(state.values["scaler"])
    device = next(iter(trained.values())).device
    return state.step, {name: value.to(device) for name, value in state.ema.items()}


def _checkpoint_bytes(trained: dict[str, nn.Parameter], run: Run) -> int:
    """Weights, two moments of Adam, and the EMA, in fp32: what 8-bit moments save is left as a margin."""
    return sum(parameter.numel() for parameter in trained.values()) * 4 * (3 + bool(run.ema))


def _copy_into(trained: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            trained[name].copy_(value)


def _state(
    step: int,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: dict[str, Tensor],
    accelerator: Accelerator,
) -> State:
    tensors, values = state_tensors(optimizer)
    extra: dict[str, Any] = {"optimizer": values}
    if accelerator.scaler is not None:
        extra["scaler"] = accelerator.scaler.state_dict()
    return State(step, to_cpu(trained), to_cpu(tensors), to_cpu(ema), extra)


def _check_finite(
    accelerator: Accelerator,
    model: nn.Module,
    folder: RunFolder,
    n: int,
    loss: Tensor,
    norm: Tensor | None,
    seen: list[Batch],
) -> None:
    """Stops every process before a bad update. Under fp16 an infinite gradient is the scaler's: it skips the step."""
    value, length = float(loss), None if norm is None or accelerator.scaler is not None else float(norm)
    bad = not math.isfinite(value) or (length is not None and not math.isfinite(length))
    if not _all_reduce_max(accelerator, int(bad)):
        return
    step: Step = accelerator.unwrap_model(model)
    samples = nonfinite.describe(seen, [step.objective.timesteps(step.positions(batch.draws)) for batch in seen])
    everyone = gather_object([(value, samples)])
    worst = next((loss for loss, _ in everyone if not math.isfinite(loss)), value)
    samples = [sample for _, part in everyone for sample in part]
    bundle = folder.path / f"bad-step-{n + 1:06d}"
    if accelerator.is_main_process:
        bundle = nonfinite.write_bundle(folder.path, n + 1, worst, length, samples)
    raise CheckFailed(nonfinite.sentence(n + 1, worst, length, samples, bundle))


def _log(
    accelerator: Accelerator,
    folder: RunFolder,
    run: Run,
    step: int,
    loss: Tensor,
    norm: Tensor | None,
    lr: float,
    seconds: float,
    advance: Callable[[int, str], None],
) -> None:
    if step % run.log_every and step != run.steps:
        advance(1, "")
        return
    mean = float(accelerator.reduce(loss, reduction="mean"))
    values = {"loss": mean, "lr": lr, "grad_norm": float(norm) if norm is not None else 0.0}
    if accelerator.is_main_process:
        folder.log(step, values | {"seconds": round(seconds, 4)})
    if run.trackers:
        accelerator.log(values, step=step)
    advance(1, f"loss {mean:.4f}")

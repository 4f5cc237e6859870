"""The only training loop. One batch can be read straight through, from latents to the stepped optimiser."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from finetune import badstep
from finetune.batch import Batch
from finetune.config import Run
from finetune.data.batches import check_split
from finetune.devices import auto_precision
from finetune.draws import Draw, generator, uniform
from finetune.dropout import SampleDropout, replace_dropout
from finetune.errors import BadInput, CheckFailed
from finetune.families.base import Family
from finetune.loss import per_sample
from finetune.objectives import Objective
from finetune.optim import Optim, Window, load_state_tensors, state_tensors
from finetune.penalties import Noised, Penalty
from finetune.progress import phase
from finetune.run import RunFolder, State, clone, to_cpu
from finetune.signals import Interrupted, Signals

PromptEncoder = Callable[[Sequence[str], Tensor | None], dict[str, Tensor]]


class MicroBatches(Protocol):
    """Step number and micro-batch number -> this process's batch: a pure function."""

    def micro(self, step: int, index: int) -> Batch: ...


class Step(nn.Module):
    """Latents -> noise -> prediction -> loss, for one micro-batch.

    Only the parts that train are submodules, so that Accelerate wraps, moves and synchronises nothing else.
    """

    def __init__(
        self,
        family: Family,
        trained_parts: Sequence[str],
        objective: Objective,
        encode_prompts: PromptEncoder,
        encoder_dropout: float = 0.0,
        penalties: Sequence[Penalty] = (),
    ) -> None:
        super().__init__()
        self.trained = nn.ModuleDict({name: family.parts[name] for name in trained_parts})
        for name, part in self.trained.items():
            replace_dropout(part, name)
        self.family, self.objective, self.encode_prompts = family, objective, encode_prompts
        self.encoder_dropout, self.penalties = encoder_dropout, penalties
        self.stratify: int | None = None  # samples of a global batch, to spread them evenly over the timesteps

    def forward(self, batch: Batch) -> Tensor:
        """The mean over the batch of weight * error(prediction, target), and the penalties: a float32 scalar."""
        SampleDropout.drawing(batch.draws)
        x0 = batch.sample_latents()
        noise, added = (value.to(x0.device) for value in self.objective.noises(batch.draws, x0.shape[1:]))
        t = self.objective.timesteps(self.positions(batch.draws)).to(x0.device)
        kept = self.kept(batch.draws)
        cond = self.encode_prompts(batch.prompts, kept)
        noisy = batch.beside(self.objective.add_noise(x0, added, t))
        prediction = self.family.predict(noisy, t, cond, batch.geometry)
        error = per_sample(self.objective.error(prediction.float(), self.objective.target(x0, noise, t)), batch.mask)
        weight = self.objective.weight(t)
        at = Noised(batch, noisy, t, weight * batch.weight, kept)
        return sum((penalty(at) for penalty in self.penalties), start=(error * weight * batch.weight).mean())

    def kept(self, draws: list[Draw]) -> Tensor | None:
        """[encoders, B]: 0 where a text encoder's output is dropped, on its own (arXiv:2403.03206, 5.2)."""
        if not self.encoder_dropout:
            return None
        each = [uniform(draws, f"text encoder {n}") for n in range(len(self.family.text_encoders))]
        return (torch.stack(each) >= self.encoder_dropout).float()

    def positions(self, draws: list[Draw]) -> Tensor:
        """Where in [0, 1) each sample's timestep lies [B]: uniform over the noise levels of the base, or one in each
        of `stratify` equal parts of them."""
        u, share = uniform(draws, "timestep"), self.family.noise_share
        if self.stratify is None:
            return u * share
        order = torch.randperm(self.stratify, generator=generator(draws[0].seed, "strata", draws[0].step))
        return (order[[draw.sample for draw in draws]] + u) / self.stratify * share


def make_accelerator(run: Run, adapter: bool) -> Accelerator:
    """Device, precision, accumulation and processes, as the recipe asks for them.

    An adapter on a bf16 base trains without autocast (the adapter is fp32 and the base is cast once); full
    training in bf16 keeps fp32 weights under autocast. fp16 needs Accelerate's loss scaling in both.
    """
    precision = resolve_precision(run)
    if precision == "fp16" and not torch.cuda.is_available():
        raise BadInput("run.precision is 'fp16' but there is no CUDA GPU here: set run.precision=fp32 or bf16")
    mixed = {"fp32": "no", "bf16": "no" if adapter else "bf16", "fp16": "fp16"}[precision]
    accelerator = Accelerator(
        mixed_precision=mixed,
        gradient_accumulation_steps=run.accumulate,
        log_with=list(run.trackers) or None,
        project_dir=".",  # trackers ask for one; `job.train` sets it once the run folder is known
        cpu=not torch.cuda.is_available() and not torch.backends.mps.is_available(),
    )
    _check_launch(accelerator, run)
    return accelerator


def _check_launch(accelerator: Accelerator, run: Run) -> None:
    """Some launchers start fewer processes than they were asked for, and some settings change precision in silence."""
    world = accelerator.num_processes
    if run.processes not in (None, world):
        raise BadInput(
            f"run.processes is {run.processes} but {world} process(es) were started: use `finetune train --processes "
            f"{run.processes}` or torchrun (`accelerate launch --cpu` starts one, whatever it is told)"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        raise BadInput("ACCELERATE_USE_FSDP is set, but weights are not sharded here: unset it")
    check_split(run.batch_size, run.accumulate, world)


def resolve_precision(run: Run) -> str:
    """What `run.precision` is on this machine."""
    return auto_precision() if run.precision == "auto" else run.precision


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
    penalties: Sequence[Penalty] = (),
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
        family, _parts_of(trained), objective.to(accelerator.device), encode_prompts, encoder_dropout, penalties
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
            _update_ema(ema, trained, run.ema, n)
            _log(accelerator, folder, run, n + 1, loss, norm, lr, time.perf_counter() - began, advance)
            stop = _anywhere(accelerator, signals.received or 0)
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


def _anywhere(accelerator: Accelerator, own: int) -> int:
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


def _update_ema(ema: dict[str, Tensor], trained: dict[str, nn.Parameter], decay: float | None, step: int) -> None:
    """ema += (1 - d) (weights - ema), with d = min(decay, (1 + n)/(10 + n)) so that a short run is not its start."""
    if not ema or decay is None:
        return
    decay = min(decay, (1 + step) / (10 + step))
    averages = [ema[name] for name in trained]
    torch._foreach_lerp_(averages, [parameter.detach() for parameter in trained.values()], 1 - decay)


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
    if not _anywhere(accelerator, int(bad)):
        return
    step: Step = accelerator.unwrap_model(model)
    samples = badstep.describe(seen, [step.objective.timesteps(step.positions(batch.draws)) for batch in seen])
    everyone = gather_object([(value, samples)])
    worst = next((loss for loss, _ in everyone if not math.isfinite(loss)), value)
    samples = [sample for _, part in everyone for sample in part]
    bundle = folder.path / f"bad-step-{n + 1:06d}"
    if accelerator.is_main_process:
        bundle = badstep.write_bundle(folder.path, n + 1, worst, length, samples)
    raise CheckFailed(badstep.sentence(n + 1, worst, length, samples, bundle))


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

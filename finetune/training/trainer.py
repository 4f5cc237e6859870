"""The training loop: restores, steps, saves and logs. It does not depend on recipes or run folders."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from finetune.core.batch import Batch
from finetune.core.errors import BadInput, CheckFailed
from finetune.core.events import CheckpointSaved, Restored, StepDone, emit, phase
from finetune.core.signals import Interrupted, Stop
from finetune.optim.base import Optimiser, Window
from finetune.optim.state import load_state_tensors, state_tensors
from finetune.training import nonfinite
from finetune.training.checkpoint import Checkpoints, State
from finetune.training.ema import Ema, copy_into
from finetune.training.fsdp import held_weights
from finetune.training.peers import joined
from finetune.training.settings import Run
from finetune.training.step import MicroBatches, Step


@dataclass(frozen=True)
class Trainable:
    """The trained parameters.

    `parameters`: name -> fp32 parameter, from `Method.attach`. `windows`: name -> (start, end) of its training as
    shares of the run; parameters without an entry are trained throughout. `fill`: reads the weights of a module of
    the trained parts that has none yet (`finetune.families.hollow`); None where all have theirs.
    """

    parameters: Mapping[str, nn.Parameter]
    windows: Mapping[str, Window] = field(default_factory=dict)
    fill: Callable[[nn.Module], None] | None = None


class Trainer:
    """Minimises the loss of `step` over the parameters `trained`, starting from the newest checkpoint.

    Args:
        step: computes the loss of one micro-batch.
        trained: the parameters to train.
        optim: the settings of the optimiser.
        run: the settings of the run, such as the number of steps.
        accelerator: device, precision and processes (`training.accelerate`).
        checkpoints: saves and loads the run's states.
    """

    def __init__(
        self,
        step: Step,
        trained: Trainable,
        optim: Optimiser,
        run: Run,
        accelerator: Accelerator,
        checkpoints: Checkpoints,
    ) -> None:
        self.step, self.optim, self.run = step, optim, run
        self.accelerator, self.checkpoints = accelerator, checkpoints
        self.peers = joined()
        self.peers.wait()  # for models that load slowly: the first collective operation has a timeout
        self.held = held_weights(step, trained.parameters, accelerator, run.shard, trained.fill)
        self.trained = self.held.parameters
        step.move_to(accelerator.device)  # the optimiser creates its state there
        optimizer = optim.build(self.trained, trained.windows)
        self.model, self.optimizer = self.held.prepared(step, optimizer)
        self.ema = Ema(self.trained, run.ema)

    def fit(
        self,
        batches: MicroBatches,
        after_step: Callable[[int], None] = lambda step: None,
        stop: Stop | None = None,
        after_restore: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Trains up to step `run.steps`. Afterwards the parameters hold the EMA or the optimiser's own average, if
        any.

        Args:
            batches: the source of this process's batches.
            after_step: called on every process after each step with its number (from 1), for previews.
            stop: holds the request to stop early, from a signal.
            after_restore: called on every process with the number of steps of a checkpoint that was loaded.

        Raises:
            BadInput: the disk has no space for the checkpoints.
            CheckFailed: a loss or gradient is not finite. The weights are not updated.
            Interrupted: `stop` was requested. The step was completed and its checkpoint written.
        """
        stop = stop or Stop()
        first = self.restore()
        if self.accelerator.is_main_process:
            self.checkpoints.check_space(self._checkpoint_bytes() * (self.run.keep + self.run.keep_best + 1))
        self.model.train()
        with phase("Training", self.run.steps, "steps") as advance, stop.deferred():
            advance(first, "")
            if first:
                after_restore(first)
            for n in range(first, self.run.steps):
                advance(1, self._one_step(batches, n))
                asked = self._all_reduce_max(stop.received or 0)
                if asked or (n + 1) % self.run.checkpoint_every == 0 or n + 1 == self.run.steps:
                    self.save(n + 1)
                if asked:
                    raise Interrupted(asked)
                after_step(n + 1)
        self.peers.wait()
        self.optim.to_result(self.optimizer)
        self.ema.copy_to_weights()
        self.accelerator.free_memory()  # it keeps references to the model and the optimiser

    @contextmanager
    def result_weights(self) -> Iterator[None]:
        """Inside the block the trained parameters hold the weights that an export would contain now."""
        with self.optim.result_weights(self.optimizer), self.ema.swapped_in():
            yield

    def restore(self) -> int:
        """Loads the newest valid checkpoint, if any. Returns the number of completed steps.

        The first process's state counts: it is sent to the others, whatever their disks hold.

        Raises:
            BadInput: afterwards some process has another state than the first.
        """
        state = self.held.read(self.checkpoints)
        step = state.step if state else 0
        if self.accelerator.is_main_process:
            emit(Restored(step))
        if state is not None:
            self._load(state)
        self.held.refuse_others(lambda: self._state(step))
        return step

    def _load(self, state: State) -> None:
        if self.optim.shards == "same" and state.pieces != self.held.pieces:
            raise BadInput(
                f"the checkpoint of step {state.step} has the moments of optim.kind {self.optim.kind} in blocks of "
                f"{state.pieces} pieces, which can't be cut anew: resume with "
                f"run.shard={str(state.pieces > 1).lower()} and {state.pieces} process(es), or train with "
                "optim.kind=adamw"
            )
        copy_into(self.trained, state.trained)
        load_state_tensors(self.optimizer, state.optimizer, state.values.get("optimizer", {}))
        if self.accelerator.scaler is not None and "scaler" in state.values:
            self.accelerator.scaler.load_state_dict(state.values["scaler"])
        self.ema.load(state.ema)

    def save(self, step: int) -> None:
        """Writes the state after `step` steps as a checkpoint; all processes wait until it is there."""
        folder = self.held.save(self.checkpoints, lambda: self._state(step), self.run.keep)
        if folder is not None:
            emit(CheckpointSaved(step, folder))
        self.peers.wait()

    def _state(self, step: int) -> State:
        """What this process holds, which training goes on to change."""
        tensors, values = state_tensors(self.optimizer)
        extra: dict[str, Any] = {"optimizer": values}
        if self.accelerator.scaler is not None:
            extra["scaler"] = self.accelerator.scaler.state_dict()
        return State(step, dict(self.trained), tensors, self.ema.averages, extra, self.held.pieces)

    def _one_step(self, batches: MicroBatches, n: int) -> str:
        """Runs step n, from 0. Returns a text for the progress bar."""
        began = time.perf_counter()
        lr = self.optim.set_lr(self.optimizer, n, self.run.steps)
        loss, norm = self._update(batches, n)
        self.ema.update(n)
        return self._log(n + 1, loss, norm, lr, time.perf_counter() - began)

    def _update(self, batches: MicroBatches, n: int) -> tuple[Tensor, Tensor | None]:
        """Makes one optimiser step. Returns the mean loss of its micro-batches, and the gradient norm before
        clipping."""
        accelerator, count = self.accelerator, self.run.accumulate
        loss = torch.zeros((), device=accelerator.device)
        norm, seen = None, []
        for index in range(count):
            batch = batches.micro(n, index).to(accelerator.device)
            seen.append(batch)
            with accelerator.accumulate(self.model):
                micro_loss = self.model(batch)
                accelerator.backward(micro_loss)
                loss += micro_loss.detach() / count
                if accelerator.sync_gradients:
                    norm = self.held.clip(self.optim.max_grad_norm or math.inf)
                    self._check_finite(n, loss, norm, seen)
                self.optimizer.step()
                self.optimizer.zero_grad()
        return loss, norm

    def _check_finite(self, n: int, loss: Tensor, norm: Tensor | None, seen: list[Batch]) -> None:
        """Stops every process before an update with a loss or gradient that is not finite. With fp16, the loss scaler
        handles infinite gradients: it skips the step."""
        value = float(loss)
        length = None if norm is None or self.accelerator.scaler is not None else float(norm)
        bad = not math.isfinite(value) or (length is not None and not math.isfinite(length))
        if not self._all_reduce_max(int(bad)):
            return
        timesteps = [self.step.objective.timesteps(self.step.positions(batch.keys)) for batch in seen]
        everyone = gather_object([(value, nonfinite.describe_samples(seen, timesteps))])
        worst = next((loss for loss, _ in everyone if not math.isfinite(loss)), value)
        samples = [sample for _, part in everyone for sample in part]
        bundle = nonfinite.bundle_folder(self.checkpoints.run, n + 1)
        if self.accelerator.is_main_process:
            nonfinite.write_bundle(bundle, n + 1, worst, length, samples)
        raise CheckFailed(nonfinite.sentence(n + 1, worst, length, samples, bundle))

    def _log(self, step: int, loss: Tensor, norm: Tensor | None, lr: float, seconds: float) -> str:
        if step % self.run.log_every and step != self.run.steps:
            return ""
        mean = float(self.accelerator.reduce(loss, reduction="mean"))
        if self.accelerator.is_main_process:
            emit(StepDone(step, mean, lr, float(norm) if norm is not None else 0.0, seconds))
        return f"loss {mean:.4f}"

    def _all_reduce_max(self, own: int) -> int:
        """The largest number of all processes, so that all react in the same step to what one has found."""
        if self.accelerator.num_processes == 1:
            return own
        return int(self.accelerator.gather(torch.tensor([own], device=self.accelerator.device)).max())

    def _checkpoint_bytes(self) -> int:
        """The size of a checkpoint with weights, optimiser state and EMA in fp32. Smaller 8-bit states leave a
        margin."""
        each = 4 + max(8, math.ceil(self.optim.state_bytes)) + 4 * bool(self.run.ema)
        return self.held.values * each

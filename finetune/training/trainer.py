"""The training loop: restores, steps, saves and logs. It does not depend on recipes or run folders."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from finetune.core.errors import BadInput, CheckFailed
from finetune.core.events import CheckpointSaved, Restored, StepDone, emit, phase
from finetune.core.signals import Interrupted, Stop
from finetune.optim.base import Optimiser, Window
from finetune.optim.state import load_state_tensors, state_tensors
from finetune.training import nonfinite
from finetune.training.ahead import Ahead
from finetune.training.checkpoint import Checkpoints, State
from finetune.training.ema import Ema, copy_into
from finetune.training.fsdp import held_weights
from finetune.training.parcel import Parcel
from finetune.training.peers import joined
from finetune.training.readings import ASKED, LOSS, NORM, BadStep, ProcessRows, Readings, Unread, fetched
from finetune.training.rounding import RoundedOptimizer, build_optimizer
from finetune.training.settings import Run
from finetune.training.speed import apply_choices, tf32
from finetune.training.step import MicroBatches, Step, StepInputs
from finetune.training.writing import Writing

MANY_SKIPPED = 0.1  # of a run's steps: a loss scaler needs some to find its scale
MicroInputs = Iterable[Parcel[StepInputs] | StepInputs]  # of one step


@dataclass(frozen=True)
class Trainable:
    """The trained parameters.

    `parameters`: name -> parameter, from `Method.attach`: fp32, or bf16 as `run.weights` says. `windows`: name ->
    (start, end) of its training as shares of the run; parameters without an entry are trained throughout. `fill`:
    reads the weights of a module of the trained parts that has none yet (`finetune.families.hollow`); None where all
    have theirs.
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
        apply_choices(step, run, accelerator.device, accelerator.num_processes)
        optimizer = build_optimizer(optim, self.trained, trained.windows, run)
        self.rounded = optimizer if isinstance(optimizer, RoundedOptimizer) else None
        self.model, self.optimizer = self.held.prepared(step, optimizer)
        self.ema = Ema(self.trained, run.ema)
        self.readings = Readings(accelerator)
        self.writing = Writing(lambda step, folder: emit(CheckpointSaved(step, folder)))
        self._unread: Unread | None = None  # the last step, if its numbers were not looked at yet
        self._seconds: list[float] = []  # of the steps since the last one that was logged
        self._asked = 0  # the signal by which some process was asked to stop

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
            CheckFailed: a loss or gradient is not finite. The weights are not updated. On a GPU it is noticed when
                the step is logged (`run.log_every`), and one step late; no such state is saved. Or fp16's loss scaler
                skipped every step, so that nothing was trained.
            Interrupted: `stop` was requested. The step was completed and its checkpoint written.
        """
        self.stop = stop = stop or Stop()
        first = self.restore()
        if self.accelerator.is_main_process:
            self.checkpoints.check_space(self._checkpoint_bytes() * (self.run.keep + self.run.keep_best + 1))
        self.model.train()
        with self._loop(batches) as (advance, feed):
            advance(first, "")
            if first:
                after_restore(first)
            for n in range(first, self.run.steps):
                advance(1, self._one_step(feed, n))
                asked = (stop.received or 0) if self.peers.world == 1 else self._asked
                if asked or (n + 1) % self.run.checkpoint_every == 0 or n + 1 == self.run.steps:
                    self.save(n + 1)
                self.writing.look()
                if asked:
                    self.settle()
                    raise Interrupted(asked)
                after_step(n + 1)
        self.peers.wait()
        if self.readings.took_none(self.run.steps):
            raise CheckFailed(nonfinite.none_taken(self.run.steps))
        self._warn_of_skipped(self.run.steps - first)
        self.optim.to_result(self.optimizer)
        self.ema.copy_to_weights()
        self.accelerator.free_memory()  # it keeps references to the model and the optimiser

    def _warn_of_skipped(self, steps: int) -> None:
        """If the loss scaler skipped many of the `steps` that were just made."""
        skipped = self.readings.skipped
        if skipped > MANY_SKIPPED * steps and self.accelerator.is_main_process:
            warnings.warn(nonfinite.many_skipped(skipped, steps), stacklevel=2)

    @contextmanager
    def _loop(self, batches: MicroBatches) -> Iterator[tuple[Callable[[int, str], None], Ahead[MicroInputs]]]:
        """What holds while the loop runs. At its end no thread is left, and the last checkpoint is on the disk."""
        with (
            phase("Training", self.run.steps, "steps") as advance,
            self.stop.deferred(),
            tf32(self.run.tf32),
            self._ahead(batches) as feed,
            self.writing,
        ):
            yield advance, feed

    @contextmanager
    def result_weights(self) -> Iterator[None]:
        """Inside the block the trained parameters hold the weights that an export would contain now."""
        if self.peers.world == 1:  # of several processes not all look, and all must learn of a bad step together
            self._report(needed=True)
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
        """Copies the state after `step` steps and begins to write it as a checkpoint, in a thread of the main process.
        Of sharded weights all processes write, and wait until it is there.

        An error of writing is raised after a later step, or at the end of the loop.
        """
        self._report(needed=True)  # what is not finite is not saved
        self.writing.settle()  # so that there is never more than one copy
        job = self.held.save(self.checkpoints, lambda: self._state(step), self.run.keep)
        if job is not None:
            self.writing.begin(step, job)

    def settle(self) -> None:
        """Returns when the checkpoint that is being written is on the disk, on every process."""
        self.writing.settle()
        self.peers.wait()

    def _state(self, step: int) -> State:
        """What this process holds, which training goes on to change."""
        tensors, values = state_tensors(self.optimizer)
        extra: dict[str, Any] = {"optimizer": values}
        if self.accelerator.scaler is not None:
            extra["scaler"] = self.accelerator.scaler.state_dict()
        return State(step, dict(self.trained), tensors, self.ema.averages, extra, self.held.pieces)

    def _ahead(self, batches: MicroBatches) -> Ahead[MicroInputs]:
        """The inputs of each step; for a GPU they are made in a thread, and each micro-batch is copied at once."""
        self.batches, device = batches, self.accelerator.device

        def made(n: int) -> MicroInputs:
            return (self.step.inputs(batches.micro(n, index)) for index in range(self.run.accumulate))

        def packed(n: int) -> MicroInputs:
            pinned = device.type == "cuda"
            whole = (self.step.inputs(batches.micro(n, index), True) for index in range(self.run.accumulate))
            with torch.cuda.device(device) if pinned else nullcontext():  # a thread begins with the first GPU
                return [Parcel.of(inputs, pinned) for inputs in whole]

        self._feed = Ahead(packed if self.readings.late else made, self.run.steps, self.readings.late)
        return self._feed

    def _one_step(self, feed: Ahead[MicroInputs], n: int) -> str:
        """Runs step n, from 0. Returns a text for the progress bar."""
        began = time.perf_counter()
        lr = self.optim.set_lr(self.optimizer, n, self.run.steps)
        if self.rounded is not None:
            self.rounded.number = n
        rows = self._update(feed.take(n), n)
        self.ema.update(n)
        due = self._is_logged(n + 1) or self.peers.world > 1
        read = fetched(rows) if due else rows.cpu
        note = self._report()  # of the step before, which is late
        self._unread = Unread(n + 1, read, due, lr, time.perf_counter() - began)
        return note if self.readings.late else self._report()

    def _update(self, micro_batches: MicroInputs, n: int) -> ProcessRows:
        """Makes one optimiser step. Returns the numbers of all processes, on the device."""
        accelerator, count = self.accelerator, self.run.accumulate
        loss = torch.zeros((), device=accelerator.device)
        rows = torch.empty(0)
        for item in micro_batches:
            inputs = item.on(accelerator.device) if isinstance(item, Parcel) else item
            with accelerator.accumulate(self.model):
                micro_loss = self.model(inputs.batch, inputs.draws, inputs.texts)
                accelerator.backward(micro_loss)
                loss += micro_loss.detach() / count
                if accelerator.sync_gradients:
                    norm = self.held.clip(self.optim.max_grad_norm or math.inf)
                    rows = self.readings.rows(n + 1, loss, norm, self.stop.received or 0)
                    self.readings.skip_bad(self.optimizer.optimizer, rows)
                    if not self.readings.late:
                        self._refuse_bad(rows)
                self.optimizer.step()
                self.optimizer.zero_grad()
        return rows

    def _report(self, needed: bool = False) -> str:
        """Looks at the last step's numbers, if they are due or needed. Returns a text for the progress bar."""
        last, self._unread = self._unread, None
        if last is None:
            return ""
        self._seconds.append(last.seconds)
        if not last.due and not needed:
            return ""
        rows = last.read()
        self._refuse_bad(rows)
        self._asked = int(rows[:, ASKED].max())
        return self._log(last, rows) if self._is_logged(last.step) else ""

    def _is_logged(self, step: int) -> bool:
        return step % self.run.log_every == 0 or step == self.run.steps

    def _log(self, last: Unread, rows: ProcessRows) -> str:
        mean, seconds = float(rows[:, LOSS].mean()), sum(self._seconds) / len(self._seconds)
        self._seconds.clear()
        if self.accelerator.is_main_process:
            emit(StepDone(last.step, mean, last.lr, float(rows[0, NORM]), seconds))
        return f"loss {mean:.4f}"

    def _refuse_bad(self, rows: ProcessRows) -> None:
        """Stops every process if a loss or gradient was not finite. With fp16, the loss scaler handles infinite
        gradients: it skips the step."""
        bad = self.readings.bad(rows)
        if bad is not None:
            self._feed.close()  # batches are not made in two threads at a time
            raise CheckFailed(self._words_of(bad))

    def _words_of(self, bad: BadStep) -> str:
        """Writes the samples of a bad step into the run folder, on the main process. Returns what the user is told."""
        seen = [self.batches.micro(bad.step - 1, index) for index in range(self.run.accumulate)]
        timesteps = [self.step.timesteps(batch.keys) for batch in seen]
        everyone = gather_object([nonfinite.describe_samples(seen, timesteps)])
        samples = [sample for part in everyone for sample in part]
        bundle = nonfinite.bundle_folder(self.checkpoints.run, bad.step)
        if self.accelerator.is_main_process:
            nonfinite.write_bundle(bundle, bad, samples)
        return nonfinite.sentence(samples, bundle, bad, self.readings.skips_bad(self.optimizer.optimizer))

    def _checkpoint_bytes(self) -> int:
        """The size of a checkpoint with weights as they are held, and optimiser state and EMA in fp32. Smaller 8-bit
        states leave a margin."""
        each = self.run.weight_bytes + max(8, math.ceil(self.optim.state_bytes)) + 4 * bool(self.run.ema)
        return self.held.values * each

"""What the CPU learns of each step: its loss, gradient norm, and whether both are finite.

Reading a number from a GPU makes the CPU wait until the GPU has computed it. So the numbers stay there as one row per
process; they are read where a step is logged, and then one step late, when the next one is under way. On a CPU they
are read at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

LOSS, NORM, WHOLE, ASKED, BAD_STEP, BAD_LOSS, BAD_NORM = range(7)  # columns of a row
ProcessRows = Tensor  # [processes, 7] float32
# of a loss scaler: a gradient that overflows fp16 even then is broken, and all steps to the end would be skipped
LEAST_SCALE = 2.0**-10


@dataclass(frozen=True)
class BadStep:
    """The first step, from 1, whose loss or gradient is not finite. `norm` is None where it does not count."""

    step: int
    loss: float
    norm: float | None


@dataclass(frozen=True)
class Unread:
    """A step whose numbers may still be computed. `due`: they are read even if nothing depends on them."""

    step: int
    read: Callable[[], ProcessRows]
    due: bool
    lr: float
    seconds: float


def reads_late(device: torch.device) -> bool:
    """Whether reading a number from `device` waits for it."""
    return device.type != "cpu"


class Readings:
    """Collects the numbers of each step on the device.

    Attributes:
        late: they are read one step late.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.late = accelerator, reads_late(accelerator.device)
        self._bad = torch.zeros(3, device=accelerator.device)  # step, loss and norm of this process's first bad step
        self._skipped = torch.zeros((), dtype=torch.int64, device=accelerator.device)
        self._first_scale = accelerator.scaler.get_scale() if accelerator.scaler else 0.0  # before a state is loaded

    def rows(self, step: int, loss: Tensor, norm: Tensor | None, asked: int) -> ProcessRows:
        """The rows of all processes after the backward of `step` (from 1), on the device: one collective operation.

        `asked`: the signal by which this process was asked to stop; 0 for none. With fp16, an infinite gradient is
        not a bad step: the loss scaler skips it, and lowers its scale, until that can't be the reason (`LEAST_SCALE`).
        """
        device = self.accelerator.device
        now = torch.stack([loss.float(), torch.zeros_like(loss).float() if norm is None else norm.float()])
        spared = ~now.isfinite() & self._scales_down(device)
        bad = ~(now.isfinite() | spared).all() & (self._bad[0] == 0)
        self._skipped += spared.any()
        first = torch.cat([torch.full((1,), float(step), device=device), now])
        self._bad = torch.where(bad, first, self._bad)
        told = torch.full((1,), float(asked), device=device)
        row = torch.cat([now, (self._bad[:1] == 0).float(), told, self._bad])[None]
        return row if self.accelerator.num_processes == 1 else self.accelerator.gather(row)

    def _scales_down(self, device: torch.device) -> Tensor:
        """[loss, norm]: whether the loss scaler may still have an answer to what is not finite."""
        scale = getattr(self.accelerator.scaler, "_scale", None)
        left = torch.zeros((), dtype=torch.bool, device=device) if scale is None else scale.squeeze() >= LEAST_SCALE
        return torch.stack([torch.zeros_like(left), left])

    def took_none(self, steps: int) -> bool:
        """Whether the loss scaler skipped all of a run's `steps`: then its scale fell at each. One step that was taken
        leaves it higher, in this process or in the one that wrote the checkpoint."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() <= self._first_scale * scaler.get_backoff_factor() ** steps

    @property
    def skipped(self) -> int:
        """The steps that the loss scaler skipped, since this process began or went on with the run. Waits for the
        device."""
        return int(self._skipped)

    def skips_bad(self, optimizer: object) -> bool:
        """Whether no bad step is applied: it is seen before the update, or a fused optimiser leaves its update out."""
        fused = self.accelerator.scaler is None and getattr(optimizer, "_step_supports_amp_scaling", False)
        return fused or not self.late

    def skip_bad(self, optimizer: Any, rows: ProcessRows) -> None:
        """Lets a fused optimiser leave out its update if a row is bad, without a reading: as for a loss scaler."""
        if self.late and self.skips_bad(optimizer):
            optimizer.found_inf = (rows[:, WHOLE] < 1).any().float()

    def bad(self, rows: ProcessRows) -> BadStep | None:
        """The first bad step of any process, from rows on the CPU; the largest fault of its processes."""
        found = [row for row in rows.tolist() if row[WHOLE] < 1]
        if not found:
            return None
        step = min(row[BAD_STEP] for row in found)
        here = torch.tensor([row for row in found if row[BAD_STEP] == step])
        faulty = ~here[:, BAD_LOSS].isfinite()
        row = here[int(faulty.int().argmax())]
        loss, norm = float(row[BAD_LOSS]), float(row[BAD_NORM])
        return BadStep(int(step), loss, None if self.accelerator.scaler and not math.isfinite(loss) else norm)


def fetched(rows: ProcessRows) -> Callable[[], ProcessRows]:
    """Begins to copy rows to the CPU. What it returns waits for them alone, and not for what the device does next."""
    if rows.device.type != "cuda":
        return rows.cpu
    there = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    there.copy_(rows, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def read() -> ProcessRows:
        done.synchronize()
        return there

    return read

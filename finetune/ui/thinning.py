"""The curve of a run's losses, read while the file grows: each byte once, and never more points than fit a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finetune.core.errors import BadInput
from finetune.core.reading import numbers_in, parse_json
from finetune.runs.metrics import DRAWN, LARGEST

POINTS = 400  # at most twice as many are kept
CHUNK = 256 * 1024  # bytes that one update reads: about 2,000 lines, so that it stays short


@dataclass
class CurvePoint:
    """Neighbouring steps as one point of a curve: the last step, and mean, lowest and highest loss."""

    step: int
    count: int
    total: float
    low: float
    high: float

    def joined(self, other: CurvePoint) -> CurvePoint:
        """This point and the next one as one."""
        both = min(self.low, other.low), max(self.high, other.high)
        return CurvePoint(other.step, self.count + other.count, self.total + other.total, *both)


class ThinCurve:
    """Points of equally many steps. When there are too many, neighbours are joined: memory stays the same."""

    def __init__(self) -> None:
        self.points: list[CurvePoint] = []
        self.stride = 1
        self.seconds = 0.0  # of all steps
        self.steps = 0
        self.lr = 0.0

    def add(self, step: int, loss: float, lr: float, seconds: float) -> None:
        """Adds the next step."""
        self.steps, self.seconds, self.lr = self.steps + 1, self.seconds + seconds, lr
        point = CurvePoint(step, 1, loss, loss, loss)
        if self.points and self.points[-1].count < self.stride:
            self.points[-1] = self.points[-1].joined(point)
            return
        self.points.append(point)
        if len(self.points) > 2 * POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=False)
            odd = self.points[-1:] if len(self.points) % 2 else []
            self.points = [one.joined(other) for one, other in pairs] + odd
            self.stride *= 2

    def rows(self) -> list[list[float]]:
        """[step, mean, lowest, highest] of each point."""
        return [
            [each.step, _short(each.total / each.count), _short(each.low), _short(each.high)] for each in self.points
        ]


def _short(value: float) -> float:
    return float(f"{value:.5g}")


class GrowingMetrics:
    """Reads RUN/metrics.jsonl as it grows. A file that was written anew, as at a resumption, is read again."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.bytes_read = 0  # in all
        self._begin()

    def _begin(self) -> None:
        self.curve, self._offset, self._number = ThinCurve(), 0, -1

    def update(self) -> bool:
        """Reads what is new, at most CHUNK bytes. Returns whether more is there already."""
        try:
            about = self.file.stat()
        except FileNotFoundError:
            self._begin()
            return False
        if about.st_ino != self._number or about.st_size < self._offset:
            self._begin()
            self._number = about.st_ino
        if about.st_size == self._offset:
            return False
        with self.file.open("rb") as file:
            file.seek(self._offset)
            part = file.read(CHUNK)
        self.bytes_read += len(part)
        whole = part.rfind(b"\n") + 1
        if not whole and len(part) == CHUNK:  # a line that no run writes: not looked at
            whole = len(part)
        for line in part[:whole].splitlines():
            self._take(line)
        self._offset += whole
        return whole > 0 and self._offset < about.st_size

    def _take(self, line: bytes) -> None:
        try:
            row = numbers_in(parse_json(line.decode("utf-8", "replace"), "metrics.jsonl", dict, finite=False))
        except BadInput:
            return
        if row.keys() >= DRAWN and all(abs(row[key]) < LARGEST for key in DRAWN):
            self.curve.add(int(row["step"]), row["loss"], row["lr"], row["seconds"])

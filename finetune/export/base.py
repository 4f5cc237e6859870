"""The export seam: what was trained -> a file that another program reads. A new format is one new file here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Adapter:
    """A trained LoRA, free of any library's classes.

    `layers`: part ("denoiser", "text_encoder", "text_encoder_2") -> module path inside the part -> (A, B), the
    fp32 matrices [r, in(,k,k)] and [out, r(,1,1)]; the module's delta is `scale * B @ A` with
    scale = alpha / rank.
    """

    family: str  # Family.name
    base_folder: Path
    layers: dict[str, dict[str, tuple[Tensor, Tensor]]]
    rank: int
    alpha: float
    rank_stabilised: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)


@dataclass(frozen=True)
class Exported:
    """One written file (or folder) and what its checks found.

    `largest_error`: largest relative error of a module's delta re-built from the re-opened file, against the
    trained one. `checks`: one line per check, "ok: ..." or "FAILED: ...".
    """

    format: str
    path: Path
    size: int  # bytes
    modules: int
    largest_error: float
    read_by: tuple[str, ...]  # the programs whose rules the file satisfies
    checks: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not any(check.startswith("FAILED") for check in self.checks)


class Export(ABC):
    """One format."""

    name: ClassVar[str]  # "kohya", "diffusers", "peft"

    @abstractmethod
    def write(self, adapter: Adapter, path: Path, dtype: str, metadata: dict[str, str]) -> None: ...

    @abstractmethod
    def read(self, path: Path, family: str) -> Adapter:
        """Re-opens a file of this format, with nothing taken from memory."""

"""The export seam: what was trained -> files that other programs read. A new format is one new file here."""

from __future__ import annotations

import gc
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from finetune.core.devices import DTYPES
from finetune.core.records import Check
from finetune.export.settings import Verify
from finetune.families.base import Family
from finetune.families.settings import Base
from finetune.methods.base import Artifact
from finetune.methods.textual_inversion import Inversion

SMALL = 2.0**-6  # of the largest value of B: most of its values then are far enough above fp16's smallest
Load = Callable[[torch.dtype], Family]  # a clean base in a precision, on the CPU


@dataclass(frozen=True)
class Bench:
    """Where exports are checked: on clean bases from `load`, one at a time, on `device` and in `dtype`; and how far
    (`export.verify`)."""

    device: torch.device
    dtype: torch.dtype
    load: Load
    verify: Verify = "full"

    @classmethod
    def of(cls, family: Family, load: Load, verify: Verify = "full") -> Bench:
        """Where a family is, and in its precision."""
        return cls(family.device, family.parts.dtype("denoiser"), load, verify)

    @contextmanager
    def clean(self) -> Iterator[Family]:
        """A clean base inside the block, which leaves memory after it."""
        family = self.load(self.dtype)
        family.parts.to(self.device)
        try:
            with full_fp32():
                yield family
        finally:
            discard(family)

    @property
    def precision(self) -> str:
        """ "fp32", "fp16" or "bf16"."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)


def discard(family: Family) -> None:
    """Takes a family's weights out of memory, wherever else the family is still named."""
    family.parts.keep_released = False
    family.parts.release(list(family.parts))
    gc.collect()  # pipelines and adapted layers may stand in circles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def full_fp32() -> Iterator[None]:
    """Inside the block, fp32 on a GPU is fp32: convolutions there are rounded to TF32 (10 bits) unless that is
    forbidden, and bounds for fp32 would not hold."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32, cudnn.allow_tf32 = False, False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@dataclass(frozen=True)
class Adapter:
    """A trained LoRA, free of any library's classes.

    `layers`: part ("denoiser", "text_encoder", "text_encoder_2") -> module path inside the part, without
    `text_model.` -> (A, B), fp32 matrices [r, in(,k,k)] and [out, r(,1,1)]. A module's delta is scale * B A; r is its
    own.
    """

    family: str  # Family.name
    base_folder: Path
    layers: dict[str, dict[str, tuple[Tensor, Tensor]]]
    scale: float  # alpha / rank, or alpha / sqrt(rank) for rsLoRA

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(len(a) for _, _, a, _ in self.modules())

    def padded(self) -> Adapter:
        """The same deltas with every module at the largest rank, for formats that know one rank only."""
        rank = self.rank
        layers = {
            part: {path: _pad(a, b, rank) for path, (a, b) in modules.items()} for part, modules in self.layers.items()
        }
        return replace(self, layers=layers)

    def folded(self) -> Adapter:
        """The same deltas with the scale in B, so that alpha is the rank."""
        layers = {
            part: {path: (a, b * self.scale) for path, (a, b) in modules.items()}
            for part, modules in self.layers.items()
        }
        return replace(self, layers=layers, scale=1.0)

    def balanced(self) -> Adapter:
        """The same deltas, with a power of two moved from A to B where B is small: after few steps, or held near 0, it
        would lose digits in fp16, whose smallest normal number is 6e-5."""
        layers = {
            part: {path: _balance(a, b) for path, (a, b) in modules.items()} for part, modules in self.layers.items()
        }
        return replace(self, layers=layers)

    @property
    def alpha(self) -> float:
        """The alpha that gives this scale by the plain rule alpha / rank, which every reader follows."""
        return self.scale * self.rank

    def modules(self) -> Iterator[tuple[str, str, Tensor, Tensor]]:
        for part, layers in self.layers.items():
            for path, (a, b) in layers.items():
                yield part, path, a, b

    @property
    def count(self) -> int:
        return sum(len(layers) for layers in self.layers.values())


def _balance(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    largest_a, largest_b = float(a.abs().max()), float(b.abs().max())
    if not 0 < largest_b < SMALL or not largest_a > largest_b:
        return a, b
    factor = 2.0 ** math.floor(math.log2(largest_a / largest_b) / 2)
    return a / factor, b * factor


def _pad(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - len(a)
    if not missing:
        return a, b
    return torch.cat([a, a.new_zeros(missing, *a.shape[1:])]), torch.cat(
        [b, b.new_zeros(len(b), missing, *b.shape[2:])], 1
    )


@dataclass(frozen=True)
class Exported:
    """One written file or folder, and what its checks found.

    `largest_error`: the largest relative error of a module's delta, rebuilt from the re-opened file, against the
    trained one.
    """

    format: str
    path: Path
    size: int  # bytes
    modules: int
    largest_error: float | None  # None: not measured
    read_by: list[str]
    checks: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(check.passed for check in self.checks)


def unchecked(form: str, path: Path, modules: int) -> Exported:
    """What was written and not looked at again (`export.verify: off`): it has no checks, and nothing is claimed."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return Exported(form, path, sum(file.stat().st_size for file in files), modules, None, [])


@dataclass(frozen=True)
class Request:
    """Where an export is written and how: NAME in `folder`, its numbers in `dtype`.

    `about`: title, resolution ("512x512"), trigger_phrase, and whatever else the run says of itself. `v_prediction`:
    what the base predicts. `force`: an older file is written over.
    """

    folder: Path
    name: str
    dtype: str  # "fp32", "fp16" or "bf16"
    about: dict[str, str]
    v_prediction: bool = False
    force: bool = False


class Export(ABC):
    """One format of one kind of artifact: derive from the class of that kind, below.

    Class attributes:
        name: what recipes and `--to` call it.
        artifact: what it holds of what a method leaves (`Method.artifacts`).
        usual: written where no format is asked for.
    """

    name: ClassVar[str]
    artifact: ClassVar[Artifact]
    usual: ClassVar[bool] = True

    @abstractmethod
    def path(self, folder: Path, name: str, family: str) -> Path:
        """Where this format of something called `name` is written: NAME.safetensors is what most UIs read."""


class AdapterExport(Export):
    """A format of LoRA files.

    Class attributes:
        read_by: the programs that read it.
        recognised: `finetune.adapters` knows its files by their keys, whoever wrote them.
    """

    artifact = "adapter"
    read_by: ClassVar[tuple[str, ...]]
    recognised: ClassVar[bool] = False

    def readers(self, adapter: Adapter) -> tuple[str, ...]:
        """The programs that are known to read this adapter whole."""
        return self.read_by

    @abstractmethod
    def write(self, adapter: Adapter, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None: ...

    @abstractmethod
    def read(self, path: Path, family: str, base_folder: Path) -> Adapter:
        """Re-opens a file of this format, with nothing taken from memory.

        Raises:
            BadInput: it is not of this format, or a key, an alpha or a shape is wrong; the key is named.
        """


class ModelExport(Export):
    """A format of whole models."""

    artifact = "weights"

    def obstacle(self, family: Family) -> str:
        """What it can't hold, such as "a base with depth inputs"; empty where it can hold the family."""
        return ""

    @abstractmethod
    def export(self, family: Family, path: Path, request: Request, verify: Verify) -> Exported:
        """Writes `path` (replacing an older export), and compares what is read back.

        Raises:
            BadInput: it can't hold this family.
        """

    @abstractmethod
    def open(self, path: Path, base: Base, dtype: torch.dtype) -> Family:
        """A written model; `base` is that of the run."""

    @abstractmethod
    def checking(self, parts: Mapping[str, float], verify: Verify) -> str:
        """What a check holds in memory beside the trained model, for the plan; empty for nothing. `parts`: the bytes
        of each as it is stored."""


class EmbeddingExport(Export):
    """A format of new words' embeddings."""

    artifact = "embedding"

    def readers(self, family: str) -> tuple[str, ...]:
        """The programs that are known to read it for a family."""
        return ()

    @abstractmethod
    def export(self, words: NewWords, family: Family, request: Request, bench: Bench) -> Exported:
        """Writes it, and compares what is read back. The family's parts need not be in memory any more."""

    @abstractmethod
    def read(self, path: Path, family: str) -> dict[str, Tensor]:
        """Text encoder -> [n, width], fp32, from a written file alone.

        Raises:
            BadInput: it is not whole, or of another kind of base.
        """

    def usage(self, family: str, file: str, token: str) -> list[str]:
        """The lines of Python with which diffusers loads a file; none where it has no reader."""
        return []


@dataclass(frozen=True)
class NewWords:
    """`rows`: text encoder -> [n, width], on the CPU. `initial`: the initialiser's words, which T5 reads."""

    method: Inversion
    rows: dict[str, Tensor]
    initial: str


def delta(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * B A in the shape of the weight, float32; for a convolution B is 1x1."""
    product = b.float().flatten(1) @ a.float().flatten(1)
    return scale * product.view(b.shape[0], *a.shape[1:])

"""The interface of export formats: they write training results as files for other programs.

To add a format, add one file to this folder.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from finetune.core.records import Check
from finetune.export.bench import Bench
from finetune.export.settings import Verify
from finetune.families.base import Family
from finetune.families.settings import Base
from finetune.methods.base import Artifact
from finetune.methods.peft_adapter import PeftAdapter
from finetune.methods.textual_inversion import Inversion

SMALL = 2.0**-6  # `balanced` changes modules whose largest |B| is below this: larger values fit well in fp16


@dataclass(frozen=True)
class Adapter:
    """A trained LoRA as plain tensors.

    `layers`: part ("denoiser", "text_encoder", "text_encoder_2") -> module path inside the part, without
    `text_model.` -> (A, B). A [r, in] and B [out, r] are fp32; for a convolution A [r, in, k, k] and B [out, r, 1, 1].
    A module's delta is scale * B A (arXiv:2106.09685 section 4.1). Each module has its own rank r.
    `alike`: other published models that its file fits as well, where nothing tells which one it is for.
    """

    family: str  # Family.name
    base_folder: Path
    layers: dict[str, dict[str, tuple[Tensor, Tensor]]]
    scale: float  # alpha / rank, or alpha / sqrt(rank) for rsLoRA
    alike: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(len(a) for _, _, a, _ in self.modules())

    def padded(self) -> Adapter:
        """The same deltas with every module padded with zeros to the largest rank, for formats with a single rank."""
        rank = self.rank
        layers = {
            part: {path: pad_rank(a, b, rank) for path, (a, b) in modules.items()}
            for part, modules in self.layers.items()
        }
        return replace(self, layers=layers)

    def folded(self) -> Adapter:
        """The same deltas with the scale multiplied into B, so that alpha equals the rank."""
        layers = {
            part: {path: (a, b * self.scale) for path, (a, b) in modules.items()}
            for part, modules in self.layers.items()
        }
        return replace(self, layers=layers, scale=1.0)

    def balanced(self) -> Adapter:
        """The same deltas. Where B is small, a power of two is moved from A to B. Otherwise B loses digits in fp16,
        whose smallest normal number is 6e-5: it is that small after few steps or with a strong penalty."""
        layers = {
            part: {path: _balance(a, b) for path, (a, b) in modules.items()} for part, modules in self.layers.items()
        }
        return replace(self, layers=layers)

    @property
    def alpha(self) -> float:
        """The alpha for which alpha / rank, the rule of every reader, equals this scale."""
        return self.scale * self.rank

    def modules(self) -> Iterator[tuple[str, str, Tensor, Tensor]]:
        """(part, module path, A, B) of every module."""
        for part, layers in self.layers.items():
            for path, (a, b) in layers.items():
                yield part, path, a, b

    @property
    def count(self) -> int:
        """The number of modules."""
        return sum(len(layers) for layers in self.layers.values())


def _balance(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    largest_a, largest_b = float(a.abs().max()), float(b.abs().max())
    if not 0 < largest_b < SMALL or not largest_a > largest_b:
        return a, b
    factor = 2.0 ** math.floor(math.log2(largest_a / largest_b) / 2)
    return a / factor, b * factor


def pad_rank(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of one module with zeros up to `rank`: the delta stays the same."""
    missing = rank - len(a)
    if not missing:
        return a, b
    return torch.cat([a, a.new_zeros(missing, *a.shape[1:])]), torch.cat(
        [b, b.new_zeros(len(b), missing, *b.shape[2:])], 1
    )


@dataclass(frozen=True)
class Exported:
    """One written file or folder, and the results of its checks.

    `largest_error`: the largest relative error |read - trained| / |trained| of a module's delta. `limits`: what the
    programs do that are known not to read all of it.
    """

    format: str
    path: Path
    size: int  # bytes
    modules: int
    largest_error: float | None  # None: not measured
    read_by: list[str]
    checks: list[Check] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all checks passed."""
        return all(check.passed for check in self.checks)


def unchecked(form: str, path: Path, modules: int) -> Exported:
    """An export that was written but not read back (`export.verify: off`): it has no checks."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return Exported(form, path, sum(file.stat().st_size for file in files), modules, None, [])


@dataclass(frozen=True)
class Request:
    """Where and how to write an export: as `name` in `folder`, with weights in `dtype`.

    `about`: title, resolution ("512x512"), trigger_phrase, and any other facts about the run. `v_prediction`: whether
    the base predicts v. `force`: overwrite an existing file.
    """

    folder: Path
    name: str
    dtype: str  # "fp32", "fp16" or "bf16"
    about: dict[str, str]
    v_prediction: bool = False
    force: bool = False


class Export(ABC):
    """One file format. A new one derives from `AdapterExport`, `NativeExport`, `ModelExport` or `EmbeddingExport`.

    Class attributes:
        name: its name in recipes and in `--to`.
        artifact: the kind of training result that it stores (one of `Method.artifacts`).
        usual: whether it is written when the recipe names no format.
        holds: the methods that it is for, for the sentence that refuses others; "" if `artifact` says it.
    """

    name: ClassVar[str]
    artifact: ClassVar[Artifact]
    usual: ClassVar[bool] = True
    holds: ClassVar[str] = ""

    @abstractmethod
    def path(self, folder: Path, name: str, family: str) -> Path:
        """The path of the file or folder for an export called `name` in `folder`."""


class AdapterExport(Export):
    """A format of LoRA files.

    Class attributes:
        read_by: the programs that read it.
        recognised: whether `finetune.adapters` recognises its files by their keys.
    """

    artifact = "adapter"
    read_by: ClassVar[tuple[str, ...]]
    recognised: ClassVar[bool] = False

    def readers(self, adapter: Adapter) -> tuple[str, ...]:
        """The programs that are known to read all of this adapter."""
        return self.read_by

    def limits(self, adapter: Adapter) -> list[str]:
        """A line for each program that is known not to read all of this adapter."""
        return []

    @abstractmethod
    def write(self, adapter: Adapter, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
        """Writes `adapter` to `path` with its matrices in `dtype`; `metadata` goes into the header, if there is one.

        Raises:
            BadInput: this format can't hold some of its modules.
        """

    @abstractmethod
    def read(self, path: Path, family: str, base_folder: Path) -> Adapter:
        """Reads an adapter from a file of this format, and from the file alone.

        Raises:
            BadInput: the file has another format, or a key, alpha or shape is wrong; the message names the key.
        """


class NativeExport(Export):
    """A format that holds adapters of other kinds than LoRA as they were trained."""

    artifact = "native"

    def readers(self, method: PeftAdapter, family: str) -> tuple[str, ...]:
        """The programs that are known to read all of this method's files exactly."""
        return ()

    def limits(self, method: PeftAdapter, family: str) -> list[str]:
        """A line for each program that is known not to read this method's files rightly."""
        return []

    def adds(self, method: PeftAdapter) -> bool:
        """Whether readers add to the weights, so that a file's error is measured against the change; False where they
        replace them (DoRA): there a change is the difference of nearly equal weights."""
        return method.kind != "dora"

    @abstractmethod
    def write(self, method: PeftAdapter, family: Family, path: Path, request: Request) -> None:
        """Writes the adapter that is attached to `family` to `path`.

        Raises:
            BadInput: the format has no name for one of its modules.
        """

    @abstractmethod
    def read(self, path: Path, family: Family) -> dict[tuple[str, str], dict[str, Tensor]]:
        """The tensors in a file: (part, module path without `text_model.`) -> name -> tensor.

        Raises:
            BadInput: the file has a module that the family does not have.
        """

    @abstractmethod
    def change(self, tensors: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        """The change of a base's weight by one module's tensors at strength 1, as its readers compute it.

        Same shape as `weight` ([out, in] or [out, in, k, k]), float32.
        """


class ModelExport(Export):
    """A format of whole models."""

    artifact = "weights"

    def obstacle(self, family: Family) -> str:
        """Why this format can't hold the family, such as "a base with depth inputs"; "" if it can."""
        return ""

    @abstractmethod
    def export(self, family: Family, path: Path, request: Request, verify: Verify) -> Exported:
        """Writes the family to `path` (replacing an older export), reads it back and compares it.

        Raises:
            BadInput: this format can't hold the family.
        """

    @abstractmethod
    def open(self, path: Path, base: Base, dtype: torch.dtype) -> Family:
        """Loads a written model in `dtype`; `base` is the run's base."""

    @abstractmethod
    def checking(self, parts: Mapping[str, float], verify: Verify) -> str:
        """What a check needs in memory in addition to the trained model, as text for the plan; "" for nothing.

        `parts`: part -> its size in the file, in bytes.
        """


class EmbeddingExport(Export):
    """A format for the trained embeddings of new words."""

    artifact = "embedding"

    def readers(self, family: str) -> tuple[str, ...]:
        """The programs that are known to read this format for a family."""
        return ()

    @abstractmethod
    def export(self, words: NewWords, family: Family, request: Request, bench: Bench) -> Exported:
        """Writes the embeddings, reads them back and compares them. The family's parts may already be released."""

    @abstractmethod
    def read(self, path: Path, family: str) -> dict[str, Tensor]:
        """Reads the embeddings from a file: text encoder -> [n, width], fp32.

        Raises:
            BadInput: the file is damaged, or belongs to another kind of base.
        """

    def usage(self, family: str, file: str, token: str) -> list[str]:
        """Lines of Python that load the file with diffusers; empty if diffusers has no reader for it."""
        return []


@dataclass(frozen=True)
class NewWords:
    """Trained embeddings.

    `rows`: text encoder -> [n, width], on the CPU. `initial`: the initialiser's words, which T5 reads instead.
    """

    method: Inversion
    rows: dict[str, Tensor]
    initial: str


def delta(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The delta of a weight: scale * B A, in the shape of the weight [out, in(, k, k)], in fp32 or wider.

    A is [r, in(, k, k)] and B [out, r(, 1, 1)] (arXiv:2106.09685 section 4.1).
    """
    product = widened(b).flatten(1) @ widened(a).flatten(1)
    return scale * product.view(b.shape[0], *a.shape[1:])


def widened(value: Tensor) -> Tensor:
    """`value` in fp32, or in fp64 if it is that."""
    return value.to(torch.promote_types(value.dtype, torch.float32))

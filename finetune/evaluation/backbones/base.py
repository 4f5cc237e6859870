"""How a network that looks at images is found, checked, hashed and given its images.

Nothing here is fetched from anywhere but the hub, and there only where a kind has a default id. What is loaded is
named in the result by the SHA-256 of its files.
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from finetune.core.errors import BadInput
from finetune.core.files import load_tensors, public_name, sha256
from finetune.core.pickles import may_read_pickles
from finetune.data.decoding import open_image
from finetune.evaluation.statistics import Vectors
from finetune.families.digests import base_hash

TOGETHER = 16  # images that go through a network at once
PATTERNS = ("*.json", "*.txt", "*.safetensors")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


@dataclass(frozen=True)
class Preparation:
    """How a network wants its images: resized with Pillow on 8-bit values, cropped in the middle, normalised.

    `size`: the shorter side, or (height, width). `crop`: (height, width), None for no crop.
    """

    size: int | tuple[int, int]
    crop: tuple[int, int] | None = None
    resample: int = Image.Resampling.BICUBIC
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def tensor(self, image: Image.Image) -> Tensor:
        """An RGB image -> [3, height, width] float32."""
        resized = image.resize(self._target(image), Image.Resampling(self.resample))
        if self.crop is not None:
            left, top = (resized.width - self.crop[1]) // 2, (resized.height - self.crop[0]) // 2
            resized = resized.crop((left, top, left + self.crop[1], top + self.crop[0]))
        values = torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255)
        return ((values - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(2, 0, 1).contiguous()

    def _target(self, image: Image.Image) -> tuple[int, int]:
        """(width, height) after resizing."""
        if isinstance(self.size, tuple):
            return self.size[1], self.size[0]
        short, long = sorted(image.size)
        other = int(self.size * long / short)
        return (self.size, other) if image.width <= image.height else (other, self.size)


class Backbone(ABC):
    """A network that turns images into rows of numbers.

    Class attributes:
        kind: what metrics and the option `--KIND` call it.
        hub: the hub id that is taken if none is given; "" if it must be given.
        wants: what to give, in words, for messages.
        reads_text: whether it has `read`.

    Attributes:
        model: the network.
        preparation: how it wants its images; unset where `prepare` is its own.
        hash: the SHA-256 of its files.
    """

    kind: ClassVar[str]
    hub: ClassVar[str] = ""
    wants: ClassVar[str]
    reads_text: ClassVar[bool] = False

    model: Any
    preparation: Preparation

    def __init__(self, place: Path, name: str) -> None:
        """
        Args:
            place: the file or folder.
            name: what was given for it: a path or a hub id.

        Raises:
            BadInput: subclasses load it here, and it is another kind of network, damaged, or not allowed.
        """
        self.place, self.name = place, public_name(name)
        self.hash = base_hash(place) if place.is_dir() else sha256(place)
        self.device = torch.device("cpu")

    @classmethod
    def opened(cls, given: str | None, metric: str) -> Backbone:
        """Finds and loads it.

        Args:
            given: a folder, a file or a hub id; None: the default hub id.
            metric: for which metric, for messages.

        Raises:
            BadInput: it is not there, can't be fetched, or is another kind of network.
        """
        source = given or cls.hub
        if not source:
            raise BadInput(f"the metric {metric} needs {cls.wants}: give it with {cls.option()}")
        place = Path(source).expanduser()
        if not place.exists():
            place = cls._fetched(source, metric)
        return cls(place, source)

    @classmethod
    def option(cls) -> str:
        """The option that names it."""
        return f"--{cls.kind.replace('_', '-')} {'DIR' if cls.hub else 'FILE'}"

    @classmethod
    def _fetched(cls, source: str, metric: str) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        advice = f"give {cls.wants} with {cls.option()}, or leave {metric} out with --metrics"
        if not cls.hub or source.count("/") != 1 or source.startswith((".", "/", "~")):
            raise BadInput(f"there is no {source} for the metric {metric}: {advice}")
        patterns = [*PATTERNS, *(["*.bin"] if may_read_pickles() else [])]
        try:
            return Path(snapshot_download(source, allow_patterns=patterns))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0].split(". ")[0].rstrip(".")[:200]
            raise BadInput(
                f"the metric {metric} needs the network {source}, which is no folder and can't be fetched from the "
                f"hub ({reason}): {advice}"
            ) from error

    def refuse(self, reason: str) -> BadInput:
        """The error that what was given can't be used."""
        return BadInput(f"{self.place} can't be used as {self.option().split()[0]} ({reason}): give {self.wants}")

    def to(self, device: torch.device) -> None:
        """Moves it to the device that looks at the images."""
        self.model.to(device)
        self.device = device

    def prepare(self, image: Image.Image) -> Tensor:
        """An RGB image -> the [3, height, width] float32 that the network reads."""
        return self.preparation.tensor(image)

    @abstractmethod
    def look(self, images: Tensor) -> Tensor:
        """[n, 3, height, width], as `prepare` makes them, on `device` -> [n, width]."""

    @torch.no_grad()
    def see(self, files: Sequence[Path]) -> Vectors:
        """Image files -> [files, width] float64.

        Raises:
            BadImage: a file can't be read.
            BadInput: the network gives values that are no numbers.
        """
        found = []
        for start in range(0, len(files), TOGETHER):
            batch = torch.stack([self.prepare(open_image(file)) for file in files[start : start + TOGETHER]])
            found.append(self.look(batch.to(self.device)).double().cpu().numpy())
        return self.finite(np.concatenate(found))

    def read(self, texts: Sequence[str]) -> Vectors:
        """Texts -> [texts, width] float64, for networks that read text."""
        raise TypeError(f"{self.kind} reads no text")

    def cut(self, texts: Sequence[str]) -> list[str]:
        """The texts that are longer than the network reads."""
        return []

    def finite(self, values: Vectors) -> Vectors:
        """The values; raises BadInput if some are infinite or no numbers."""
        if not np.isfinite(values).all():
            raise self.refuse("it gives values that are no numbers")
        return values


def read_weights(file: Path) -> dict[str, Any]:
    """The content of a .safetensors file, or of a pickle of tensors if those are allowed.

    Raises:
        BadInput: it is a pickle and they are not allowed, or it can't be read.
    """
    pickled = file.suffix != ".safetensors"
    if pickled and not may_read_pickles():
        raise BadInput(f"{file} is a pickle, which can run code: add --allow-pickle to read only its tensors")
    try:
        values = torch.load(file, map_location="cpu", weights_only=True) if pickled else load_tensors(file)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise BadInput(f"{file} holds no weights that can be read ({_short(error)}): fetch it again") from error
    if not isinstance(values, Mapping):
        raise BadInput(f"{file} holds no named weights: give the published file")
    return dict(values)


def weight_files(place: Path) -> list[Path]:
    """The file itself, or the files with weights in a folder."""
    if place.is_file():
        return [place]
    return sorted(file for file in place.iterdir() if file.suffix in (".safetensors", ".pth", ".pt", ".bin"))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__

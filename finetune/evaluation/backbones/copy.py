"""A copy-detection descriptor, such as SSCD (arXiv:2202.10261), as a TorchScript file."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from finetune.core.errors import BadInput
from finetune.core.pickles import may_read_pickles
from finetune.evaluation.backbones.base import Backbone, Preparation


class Copy(Backbone):
    """Any TorchScript module that makes [n, width] of [n, 3, 320, 320] images normalised as for ImageNet.

    The images are squeezed to a square, as SSCD's authors advise for batches.
    """

    kind = "copy"
    wants = "a TorchScript file of a copy-detection descriptor (SSCD's sscd_disc_mixup.torchscript.pt)"

    def __init__(self, place: Path, name: str) -> None:
        if not place.is_file():
            self.place = place
            raise self.refuse("it is no file")
        if not may_read_pickles():
            raise BadInput(f"{place} is TorchScript, which runs code: add --allow-pickle if you trust it")
        super().__init__(place, name)
        self.preparation = Preparation((320, 320), resample=Image.Resampling.BILINEAR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                self.model = torch.jit.load(place, map_location="cpu").eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise self.refuse("it is no TorchScript file that can be read") from error

    def look(self, images: Tensor) -> Tensor:
        try:
            found = self.model(images)
        except RuntimeError as error:
            raise self.refuse("it does not read images of [n, 3, 320, 320]") from error
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            raise self.refuse("it does not return one row for each image")
        return found

"""AlexNet for LPIPS and VGG-19 for Gram matrices: torchvision's published weights, without torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.evaluation.backbones.base import Backbone, Preparation, read_weights, weight_files

# torchvision's `features`: channels of a 3x3 convolution with its ReLU, or "M" for a pooling layer
VGG19 = (64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M", 512, 512, 512, 512, "M", 512)
GRAM_LAYERS = (1, 6, 11, 20, 29)  # relu1_1, relu2_1, ... relu5_1, as Gatys takes them
LPIPS_LAYERS = (1, 4, 7, 9, 11)  # the five ReLUs of AlexNet
LPIPS_SHIFT, LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # for values in [-1, 1]


class ConvNet(Backbone):
    """A plain chain of layers, of which some are taken."""

    model: nn.Sequential

    def _load(self, weights: dict[str, Any]) -> None:
        own = {f"features.{name}": value for name, value in self.model.state_dict().items()}
        for name, value in own.items():
            found = weights.get(name)
            if not isinstance(found, Tensor) or found.shape != value.shape:
                raise self.refuse(f"it has no weights {name} of shape {'x'.join(map(str, value.shape))}")
            value.copy_(found)
        self.model.eval().requires_grad_(False)

    def _taken(self, images: Tensor, wanted: tuple[int, ...]) -> list[Tensor]:
        """What comes out of the layers with the numbers `wanted`."""
        found = []
        for number, layer in enumerate(self.model):
            images = layer(images)
            if number in wanted:
                found.append(images)
        return found


class Vgg(ConvNet):
    """Gram matrices of five layers, so scaled that a squared distance is Gatys' style loss.

    For a layer with N channels and M places, the loss is the squared distance of the Gram matrices / (4 N^2 M^2), and
    each of the five layers counts a fifth (arXiv:1508.06576, equations 3 to 5).
    """

    kind = "vgg"
    wants = "torchvision's weights of VGG-19 (vgg19-dcbb9e9d.pth, or the same as .safetensors)"

    def __init__(self, place: Path, name: str) -> None:
        super().__init__(place, name)
        self.preparation = Preparation((256, 256))
        self.model = vgg19()
        self._load(all_weights(place))

    def look(self, images: Tensor) -> Tensor:
        rows = []
        for layer in self._taken(images, GRAM_LAYERS):
            flat = layer.flatten(2)
            gram = flat @ flat.transpose(1, 2) / (2 * flat.shape[1] * flat.shape[2])
            rows.append(gram.flatten(1) * len(GRAM_LAYERS) ** -0.5)
        return torch.cat(rows, dim=1)


class Lpips(ConvNet):
    """AlexNet's layers, so scaled that a squared distance is LPIPS 0.1 (arXiv:1801.03924, equation 1).

    Each layer is normalised over its channels at every place and weighted by the root of LPIPS' learned weights,
    divided by the root of the number of places.
    """

    kind = "lpips"
    wants = (
        "a folder with torchvision's alexnet-owt-7be5be79.pth and LPIPS' weights/v0.1/alex.pth (or both as "
        ".safetensors)"
    )

    def __init__(self, place: Path, name: str) -> None:
        super().__init__(place, name)
        mean = tuple((shift + 1) / 2 for shift in LPIPS_SHIFT)  # of values in [0, 1] instead of [-1, 1]
        self.preparation = Preparation((256, 256), mean=mean, std=tuple(scale / 2 for scale in LPIPS_SCALE))
        self.model = alexnet()
        weights = all_weights(place)
        self._load(weights)
        self.lins = [self._lin(weights, number) for number in range(len(LPIPS_LAYERS))]

    def _lin(self, weights: dict[str, Any], number: int) -> Tensor:
        """[1, channels, 1] roots of a layer's learned weights, which are never negative."""
        found = weights.get(f"lin{number}.model.1.weight")
        channels = (64, 192, 384, 256, 256)[number]
        if not isinstance(found, Tensor) or found.numel() != channels or float(found.min()) < 0:
            raise self.refuse(f"it has no lin{number}.model.1.weight of {channels} values from 0 on")
        return found.float().reshape(1, channels, 1).sqrt()

    def look(self, images: Tensor) -> Tensor:
        rows = []
        for layer, lin in zip(self._taken(images, LPIPS_LAYERS), self.lins, strict=True):
            flat = layer.flatten(2)
            unit = flat / (flat.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
            rows.append((unit * lin.to(flat.device) * flat.shape[2] ** -0.5).flatten(1))
        return torch.cat(rows, dim=1)


def vgg19() -> nn.Sequential:
    """torchvision's `vgg19().features` up to relu5_1, with the same numbers of layers."""
    layers: list[nn.Module] = []
    channels = 3
    for item in VGG19:
        if isinstance(item, str):
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(channels, item, 3, padding=1), nn.ReLU()]
            channels = item
    return nn.Sequential(*layers)


def alexnet() -> nn.Sequential:
    """torchvision's `alexnet().features` up to its last ReLU."""
    layers = [
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    ]  # fmt: skip
    return nn.Sequential(*layers)


def all_weights(place: Path) -> dict[str, Any]:
    """The tensors of a file, or of all weight files in a folder."""
    return {name: value for file in weight_files(place) for name, value in read_weights(file).items()}

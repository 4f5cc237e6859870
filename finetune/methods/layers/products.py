"""Products with frozen weights on a CPU: oneDNN's kernels, convolutions by Winograd, and no weight gradients.

Which kernel computes a product depends on its shape and the machine alone, so a run repeats itself bit for bit there.
The results differ from torch's own by rounding (1e-6 of the largest value): all arithmetic stays in the input's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from finetune.methods.layers.winograd import Weights, convolve, transformed, turned

LEAST_WORK = 8_000_000  # multiplications of a product; below it the call of oneDNN costs more than it saves
LEAST_CONVOLUTION = 30_000_000  # the same for a packed convolution
MOST_PIXELS = 1024  # of all images of a batch; above it packing a 3x3 weight no longer pays
LEAST_WINOGRAD = (
    200_000_000  # multiplications of a convolution by Winograd; below it the operations around them cost more
)
LEAST_CHANNELS = 256  # of such a convolution, for the same reason
MEMORY_SHARE = 4  # packed weights take at most this part of the machine's memory: a quarter
ONE, TWO = (1, 1), (2, 2)
NONE: tuple[str, list[float], str] = ("none", [], "")  # no activation after the product


@cache
def has_packed_convolutions() -> bool:
    """Whether oneDNN has kernels for AVX-512 here; others were not measured."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


@cache
def has_faster_products() -> bool:
    """Whether oneDNN multiplies fp32 matrices faster than MKL, which uses AVX-512 on Intel's processors only."""
    return has_packed_convolutions() and not _is_intel()


def _is_intel() -> bool:
    file = Path("/proc/cpuinfo")
    return not file.is_file() or "GenuineIntel" in file.read_text(encoding="utf-8", errors="replace")


def memory_of_machine() -> int:
    """The machine's memory in bytes, or that of this process's container if it is smaller."""
    whole = int(psutil.virtual_memory().total)
    file = Path("/sys/fs/cgroup/memory.max")
    limit = file.read_text(encoding="utf-8").strip() if file.is_file() else "max"
    return min(whole, int(limit)) if limit.isdigit() else whole


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], weight [out, in] -> x weight^T + bias [..., out]. It has no gradient of its own."""
    large = x.dtype == torch.float32 and x.numel() * len(weight) >= LEAST_WORK
    if large and x.device.type == "cpu" and has_faster_products():
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, *NONE)
        return found
    return linear(x, weight, bias)


class FrozenLinear(nn.Linear):
    """`nn.Linear` whose weight is not trained. It becomes one by its class: its parameters are the module's own."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        large = x.numel() * len(self.weight) >= LEAST_WORK
        if not large or x.dtype != torch.float32 or not is_plain(x, self.weight):
            return super().forward(x)
        return through_frozen(x, self)

    def product(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of the output -> the gradient of the input."""
        return product(gradient, self.weight.t()).view(shape)


class Kernel(Enum):
    """What computes a convolution."""

    PLAIN = auto()  # as `nn.Conv2d` does
    MATRIX = auto()  # a matrix product for each image
    WINOGRAD = auto()  # fewer multiplications, with transformed weights
    PACKED = auto()  # oneDNN, with weights in the order that it wants


class FrozenConv2d(nn.Conv2d):
    """`nn.Conv2d` whose weight is not trained, and is stored in another form at its first use. Its input's gradient
    is a convolution too, with mirrored weights."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in, height, width] -> [B, out, height', width']."""
        if x.dim() != 4 or self._kernel(x.dtype, x.shape, self.stride) is Kernel.PLAIN or not is_plain(x, self.weight):
            return super().forward(x)
        return through_frozen(x, self)

    def product(self, x: Tensor) -> Tensor:
        kernel = self._kernel(x.dtype, x.shape, self.stride)
        if kernel is Kernel.WINOGRAD:
            return convolve(x, self._transformed(), self.bias, product)
        if kernel is Kernel.PACKED:
            return _packed(x, self._pack("forward"), self.bias, self.padding, self.stride)
        if kernel is Kernel.MATRIX:
            mixed = _each_image(self.weight.flatten(1), x)
            return mixed if self.bias is None else mixed.add_(self.bias[:, None, None])
        found: Tensor = self._conv_forward(x, self.weight, self.bias)
        return found

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of the output -> the gradient of the input, which has this shape."""
        kernel = self._kernel(gradient.dtype, shape, ONE)
        if kernel is not Kernel.PLAIN and self._halves(shape):
            gradient = _spread(gradient, shape)
        elif self.stride != ONE:
            kernel = Kernel.PLAIN
        if kernel is Kernel.WINOGRAD:
            return convolve(gradient, turned(self._transformed()), None, product)
        if kernel is Kernel.PACKED:
            return _packed(gradient, self._pack("backward"), None, self._mirrored_padding(), ONE)
        if kernel is Kernel.MATRIX:
            weight: Tensor = self._stored("matrix", lambda: self.weight.detach().flatten(1).t().contiguous())
            return _each_image(weight, gradient)
        empty = gradient.new_empty(1).expand(shape)
        sizes = self.stride, self.padding, self.dilation, False, [0, 0], self.groups
        found: Tensor = torch.ops.aten.convolution_backward(
            gradient, empty, self.weight, None, *sizes, [True, False, False]
        )[0]
        return found

    @property
    def _is_same(self) -> bool:
        """Whether its filters have 3x3 weights and keep the size of an image, but for the stride."""
        return self.kernel_size == (3, 3) and self.padding == (1, 1)

    def _halves(self, shape: torch.Size) -> bool:
        """Whether it makes images of this shape [B, in, height, width] half as large, exactly."""
        return self.stride == TWO and self._is_same and shape[2] % 2 == shape[3] % 2 == 0

    def _kernel(self, dtype: torch.dtype, shape: torch.Size, stride: tuple[int, ...]) -> Kernel:
        """The fastest for inputs of this shape [B, in, height, width]."""
        size, exact = shape[2] * shape[3], dtype == torch.float32
        if shape[0] == 0 or dtype not in (torch.float32, torch.bfloat16):
            return Kernel.PLAIN
        if stride == ONE and self.kernel_size == (1, 1) and self.padding == (0, 0):
            pays = exact and has_faster_products() and self.weight.numel() * size >= LEAST_WORK
            return Kernel.MATRIX if pays else Kernel.PLAIN
        pixels = shape[0] * size
        work = pixels * self.weight.numel()
        winograd = exact and stride == ONE and self._is_same and min(self.weight.shape[:2]) >= LEAST_CHANNELS
        if winograd and work >= LEAST_WINOGRAD:
            return Kernel.WINOGRAD
        return Kernel.PACKED if pixels <= MOST_PIXELS and work >= LEAST_CONVOLUTION else Kernel.PLAIN

    def _transformed(self) -> Weights:
        found: Weights = self._stored("transformed", lambda: transformed(self.weight.detach()))
        return found

    def _pack(self, way: str) -> Tensor:
        found: Tensor = self._stored(way, lambda: self._packed_weight(way))
        return found

    def _stored(self, name: str, make: Callable[[], Any]) -> Any:
        version = self.weight._version, self.weight.data_ptr()
        if self.__dict__.get("_version") != version:
            # the weight is held too: another one at its freed address would have the same version
            self.__dict__["_packs"], self.__dict__["_version"] = {"weight": self.weight.detach()}, version
        packs: dict[str, Any] = self.__dict__["_packs"]
        if name not in packs:
            packs[name] = make()
        return packs[name]

    def _packed_weight(self, way: str) -> Tensor:
        weight, stride = self.weight.detach(), self.stride
        padding = [int(number) for number in self.padding]
        if way == "backward":
            weight, stride = weight.flip(2, 3).transpose(0, 1).contiguous(), ONE
            padding = self._mirrored_padding()
        # always packed for images of the same size, so that the order of the batches changes nothing
        size = [2, weight.shape[1], 8, 8]
        found: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, ONE, 1, size)
        return found

    def _mirrored_padding(self) -> list[int]:
        own = [int(number) for number in self.padding]
        return [size - 1 - number for size, number in zip(self.kernel_size, own, strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        """For copies: packed weights can't be copied."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_packs", "_version")}

    def drop_packs(self) -> None:
        self.__dict__.pop("_packs", None)
        self.__dict__.pop("_version", None)


def can_pack(module: nn.Conv2d) -> bool:
    """Whether `FrozenConv2d` knows this kind of convolution."""
    if module.groups != 1 or module.dilation != (1, 1) or module.padding_mode != "zeros":
        return False
    if isinstance(module.padding, str):
        return False
    return all(border < size for border, size in zip(module.padding, module.kernel_size, strict=True))


def is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether the product needs nothing of autocast, of another device, or of another dtype."""
    return x.device.type == "cpu" and x.dtype == weight.dtype and not torch.is_autocast_enabled("cpu")


def _each_image(weight: Tensor, x: Tensor) -> Tensor:
    """weight [out, in], x [B, in, height, width] -> [B, out, height, width], without another order of the pixels."""
    return torch.stack([product(weight, image.flatten(1).t()) for image in x]).view(len(x), -1, *x.shape[2:])


def _spread(gradient: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of a convolution with a stride of 2 -> that of the same one without, with zeros in between."""
    spread = gradient.new_zeros(*gradient.shape[:2], *shape[2:])
    spread[:, :, ::2, ::2] = gradient
    return spread


def _packed(x: Tensor, pack: Tensor, bias: Tensor | None, padding: Any, stride: Any) -> Tensor:
    found: Tensor = torch.ops.mkldnn._convolution_pointwise(x, pack, bias, *(padding, stride, ONE, 1), *NONE)
    return found


def through_frozen(x: Tensor, layer: FrozenLinear | FrozenConv2d) -> Tensor:
    function: Any = _Product
    found: Tensor = function.apply(x, layer)
    return found


class _Product(torch.autograd.Function):
    """A frozen layer's output. Nothing but the shape of its input is kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear | FrozenConv2d) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.input_gradient(gradient, ctx.shape), None

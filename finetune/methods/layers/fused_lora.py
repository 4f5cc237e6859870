"""One autograd function for a frozen layer and its LoRA: y = base(x) + s B A x.

PEFT's layers compute B A x, its scaled copy and the sum one by one, each with its part of the graph and a tensor of
the output's size. Here the update is added to the base's output in place. Layers become these classes by their class
alone, so that parameters, names, state dict and exports stay PEFT's.

On a GPU (`run.fast=on`) the layer below is torch's own, and what is saved is PEFT's fp32: on a base in half precision
it copies x to fp32 and multiplies that, without tensor cores.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Conv2d, Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, linear

from finetune.methods.layers.products import FrozenConv2d, FrozenLinear, product


def only_adapter(layer: Any) -> str | None:
    """The name of the one plain LoRA that a PEFT layer applies now.

    None: it is switched off, merged, not alone, has dropout, a bias or a variant such as DoRA: PEFT computes that.
    """
    if layer._disable_adapters or layer.merged_adapters:
        return None
    names = layer.active_adapters
    if len(names) != 1 or names[0] not in layer.lora_A or names[0] in layer.lora_variant:
        return None
    drops = layer.training and not isinstance(layer.lora_dropout[names[0]], nn.Identity)
    return None if drops or layer.lora_bias[names[0]] else names[0]


def _fused(layer: Any, x: Tensor, extra: Any) -> Tensor | None:
    """The output of a layer, or None where PEFT has to compute it."""
    name = only_adapter(layer)
    base = layer.base_layer
    read = None if name is None or extra else _read_by(base, x)
    if read is None:
        return None
    factors = layer.lora_A[name].weight, layer.lora_B[name].weight
    function: Any = _LoraConv if isinstance(base, FrozenConv2d) else _LoraLinear
    found: Tensor = function.apply(read, *factors, base, layer.scaling[name])
    return found


def _read_by(base: nn.Module, x: Tensor) -> Tensor | None:
    """What the function of a frozen layer reads: x, in autocast's dtype on a GPU. None where PEFT has to compute."""
    weight: Any = base.weight
    if is_on_cpu(x):
        plain = isinstance(base, FrozenLinear | FrozenConv2d) and x.dtype == weight.dtype
        return x if plain and not torch.is_autocast_enabled("cpu") else None
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return x.to(dtype) if type(base) is nn.Linear and weight.dtype == dtype and not weight.requires_grad else None


def is_on_cpu(x: Tensor) -> bool:
    """Whether the kernels of a CPU compute with x."""
    return x.device.type == "cpu"


def _through(base: nn.Linear, x: Tensor) -> Tensor:
    return base.product(x) if isinstance(base, FrozenLinear) else linear(x, base.weight, base.bias)


def _gradient_through(base: nn.Linear, gradient: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of a frozen layer's input, in memory of its own."""
    return base.input_gradient(gradient, shape) if isinstance(base, FrozenLinear) else gradient @ base.weight


class FusedLinear(Linear):
    """PEFT's LoRA of a linear layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] -> [..., out]."""
        found = _fused(self, x, args or kwargs)
        whole: Tensor = super().forward(x, *args, **kwargs) if found is None else found
        return whole


class FusedConv2d(Conv2d):
    """PEFT's LoRA of a convolution."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [B, in, height, width] -> [B, out, height', width']."""
        found = _fused(self, x, args or kwargs) if x.dim() == 4 else None
        whole: Tensor = super().forward(x, *args, **kwargs) if found is None else found
        return whole

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """PEFT writes into the weight's `.data`, which leaves no trace: its stored forms are dropped."""
        self._drop_packs()
        super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        """As `merge`."""
        self._drop_packs()
        super().unmerge()

    def _drop_packs(self) -> None:
        base: Any = self.base_layer
        if isinstance(base, FrozenConv2d):
            base.drop_packs()


FUSED: dict[type[nn.Module], type[nn.Module]] = {Linear: FusedLinear, Conv2d: FusedConv2d}


class _LoraLinear(torch.autograd.Function):
    """x [..., in], A [r, in], B [out, r] -> [..., out], for x in the base's dtype.

    The update is computed in that dtype too, also where the factors are fp32 and the base is bf16, as mixed precision
    does. PEFT computes it in fp32, which costs a copy of x and products in fp32. Gradients have the factors' dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, base: nn.Linear, scale: float) -> Tensor:
        ctx.dtype = a.dtype
        a, b = a.to(x.dtype), b.to(x.dtype)
        result = _through(base, x)
        low = linear(x, a)
        _add_product(result.view(-1, len(b)), low.view(-1, len(a)), b.t(), scale)
        ctx.save_for_backward(x, low, a, b)
        ctx.base, ctx.scale = base, scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        flat = gradient.reshape(-1, len(b))
        through = product(flat, b.t().contiguous()).mul_(ctx.scale)  # [N, r]
        of_a = through.t() @ x.reshape(-1, x.shape[-1])
        # flat^T low, but up to nine times as fast: its long side is not transposed
        of_b = (low.view(-1, len(a)).t() @ flat).mul_(ctx.scale).t()
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = _gradient_through(ctx.base, gradient, x.shape)
            _add_product(of_x.view(-1, x.shape[-1]), through, a, 1.0)
        return of_x, of_a.to(ctx.dtype), of_b.to(ctx.dtype), None, None


class _LoraConv(torch.autograd.Function):
    """x [B, in, height, width], A [r, in, k, k], B [out, r, 1, 1] -> [B, out, height', width']."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, base: FrozenConv2d, scale: float) -> Tensor:
        ctx.dtype = a.dtype
        a, b = a.to(x.dtype), b.to(x.dtype)
        result = base.product(x).contiguous()
        low = conv2d(x, a, None, base.stride, base.padding).flatten(2)  # [B, r, pixels]
        _add_products(result.flatten(2), b.flatten(1), low, scale)
        ctx.save_for_backward(x, low, a, b)
        ctx.base, ctx.scale = base, scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        flat = gradient.flatten(2)
        through = torch.matmul(b.flatten(1).t(), flat).mul_(ctx.scale)
        of_b = torch.bmm(low, flat.transpose(1, 2)).sum(0).mul_(ctx.scale).t().reshape(b.shape)
        base = ctx.base
        shape = (len(through), len(a), *gradient.shape[2:])
        sizes = base.stride, base.padding, [1, 1], False, [0, 0], 1
        of_low, of_a, _ = torch.ops.aten.convolution_backward(
            through.view(shape), x, a, None, *sizes, [ctx.needs_input_grad[0], True, False]
        )
        if not ctx.needs_input_grad[0]:
            return None, of_a.to(ctx.dtype), of_b.to(ctx.dtype), None, None
        return base.input_gradient(gradient, x.shape) + of_low, of_a.to(ctx.dtype), of_b.to(ctx.dtype), None, None


def _add_product(result: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """result [N, out] += scale left [N, r] right [r, out]."""
    result.addmm_(left, right, alpha=scale)


def _add_products(result: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """result [B, out, pixels] += scale left [out, r] right [B, r, pixels]."""
    result.baddbmm_(left.expand(len(result), *left.shape), right, alpha=scale)

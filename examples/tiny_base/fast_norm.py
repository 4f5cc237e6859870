"""Group normalisation whose backward pass is quick on a CPU for channels_last tensors.

torch's own takes 45 % of a training step of the VAE.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class _GroupNorm(torch.autograd.Function):
    """torch's forward pass; in the backward pass all sums run over pixels first, as the memory lies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        batch, channels, height, width = x.shape
        y, mean, rstd = torch.native_group_norm(
            x, weight.to(x.dtype), bias.to(x.dtype), batch, channels, height * width, groups, eps
        )
        ctx.save_for_backward(x, weight, mean.float(), rstd.float())
        ctx.groups = groups
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight, mean, rstd = ctx.saved_tensors
        batch, channels, height, width = x.shape
        each, pixels = channels // ctx.groups, height * width
        flat = x.permute(0, 2, 3, 1).reshape(batch, pixels, channels).float()
        above = gradient.permute(0, 2, 3, 1).reshape(batch, pixels, channels).float()
        with_x, alone = (above * flat).sum(1), above.sum(1)
        wide_mean, wide_rstd = mean.repeat_interleave(each, 1), rstd.repeat_interleave(each, 1)
        normalised = (with_x - alone * wide_mean) * wide_rstd  # sum over pixels of gradient * normalised x
        count = pixels * each
        first = (alone * weight).view(batch, ctx.groups, -1).sum(2) / count
        second = (normalised * weight).view(batch, ctx.groups, -1).sum(2) / count
        by_x = -(second * rstd.square()).repeat_interleave(each, 1)
        constant = -(first * rstd).repeat_interleave(each, 1) - by_x * wide_mean
        result = torch.addcmul(constant[:, None], flat, by_x[:, None])
        result.addcmul_(above, (wide_rstd * weight)[:, None])
        dx = result.to(x.dtype).view(batch, height, width, channels).permute(0, 3, 1, 2)
        return dx, normalised.sum(0), alone.sum(0), None, None


def quicken(model: nn.Module) -> None:
    """Replaces the forward pass of every GroupNorm in `model`; its parameters stay."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = partial(_quick_forward, module)  # type: ignore[method-assign]


def _quick_forward(own: nn.GroupNorm, x: Tensor) -> Tensor:
    found: Tensor = _GroupNorm.apply(x, own.weight, own.bias, own.num_groups, own.eps)  # type: ignore[no-untyped-call]
    return found

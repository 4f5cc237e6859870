"""3x3 convolutions in fewer multiplications: Winograd's minimal filtering F(2x2, 3x3).

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308, section 4.1: each tile of 4x4
inputs and the 3x3 weights are transformed, multiplied pixel by pixel, and transformed back to 2x2 outputs. So four
outputs take 16 multiplications instead of 36. All arithmetic stays in the input's dtype; in fp32 the result is about
twice as far from the true one as a plain convolution's, and nearer than oneDNN's with packed weights.

The 16 products over channels are plain matrix products, which the caller gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Multiply = Callable[[Tensor, Tensor], Tensor]
"""x [N, in], weight [out, in] -> x weight^T [N, out]"""
Weights = Tensor | Sequence[Sequence[Tensor]]  # 4 x 4 of [out, in]

MOST_TILES = 512  # together: with more of them the transformed inputs leave the processor's cache
MIRRORED = (3, 1, 2, 0)  # the transform of weights that are turned round has its rows and columns in this order


def transformed(weight: Tensor) -> Tensor:
    """G w G^T of each filter: weight [out, in, 3, 3] -> [4, 4, out, in]."""
    once = weight.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    both = torch.kron(once, once)  # [16, 9]: for rows and columns at once
    return (both @ weight.flatten(2).flatten(0, 1).t()).view(4, 4, *weight.shape[:2])


def turned(weights: Weights) -> Weights:
    """4 x 4 transformed weights [out, in] of a convolution -> 4 x 4 of [in, out], those of its input's gradient."""
    return [[weights[row][column].t() for column in MIRRORED] for row in MIRRORED]


def convolve(x: Tensor, weights: Weights, bias: Tensor | None, multiply: Multiply) -> Tensor:
    """x [B, in, height, width], 4 x 4 weights [out, in] -> [B, out, height, width], with a padding of 1."""
    result = x.new_empty(len(x), len(weights[0][0]), *x.shape[2:])
    height, width = x.shape[2:]
    wide = width + width % 2
    images = max(1, MOST_TILES * 4 // ((height + height % 2) * wide))  # together
    strip = 2 * max(1, MOST_TILES * 2 // wide)  # rows of a large image
    for first in range(0, len(x), images):
        some = slice(first, first + images)
        for top in range(0, height, strip):
            rows = min(strip, height - top)
            found = _convolved(_padded(x[some], top, rows), weights, bias, multiply)
            result[some, :, top : top + rows] = found[:, :, :rows, :width]
    return result


def _padded(x: Tensor, top: int, rows: int) -> Tensor:
    """x [B, in, height, width] -> some of its rows with a border of 1, of even sizes: [B, rows + 2, width + 2, in]."""
    batch, channels, height, width = x.shape
    padded = x.new_zeros(batch, rows + rows % 2 + 2, width + width % 2 + 2, channels)
    above, end = max(top - 1, 0), min(top + rows + 1, height)
    start = above - top + 1
    padded[:, start : start + end - above, 1 : 1 + width] = x[:, :, above:end].permute(0, 2, 3, 1)
    return padded


def _convolved(padded: Tensor, weights: Weights, bias: Tensor | None, multiply: Multiply) -> Tensor:
    """padded [B, height + 2, width + 2, in] of even sizes -> [B, out, height, width]."""
    batch, high, wide, channels = len(padded), padded.shape[1] // 2 - 1, padded.shape[2] // 2 - 1, padded.shape[3]
    rows = padded.new_empty(4, batch, high, 2 * wide + 2, channels)
    _split(padded, 1, rows.unbind(0))
    tiles = padded.new_empty(4, 4, batch, high, wide, channels)
    _split(rows, 3, tiles.unbind(1))
    flat = tiles.view(4, 4, -1, channels)
    products = [[multiply(flat[row, column], weights[row][column]) for column in range(4)] for row in range(4)]
    columns = [_joined(*(products[row][column] for row in range(4))) for column in range(4)]
    result = padded.new_empty(batch, high, 2, wide, 2, len(weights[0][0]))
    for row in range(2):
        for column, values in enumerate(_joined(*(columns[number][row] for number in range(4)))):
            found = values if bias is None else values.add_(bias)
            result[:, :, row, :, column] = found.view(batch, high, wide, -1)
    return result.view(batch, 2 * high, 2 * wide, -1).permute(0, 3, 1, 2)


def _split(x: Tensor, dim: int, out: tuple[Tensor, ...]) -> None:
    """B^T d along one dimension, of which every second place begins a tile of 4. The four results go to `out`."""
    count = x.shape[dim] // 2 - 1
    places = [x.narrow(dim, start, 2 * count).unfold(dim, 1, 2).squeeze(-1) for start in range(3)]
    places.append(x.narrow(dim, 3, 2 * count - 1).unfold(dim, 1, 2).squeeze(-1))
    torch.sub(places[0], places[2], out=out[0])
    torch.add(places[1], places[2], out=out[1])
    torch.sub(places[2], places[1], out=out[2])
    torch.sub(places[1], places[3], out=out[3])


def _joined(first: Tensor, second: Tensor, third: Tensor, fourth: Tensor) -> tuple[Tensor, Tensor]:
    """A^T m along one dimension. It writes into `second`."""
    top = (second + third).add_(first)
    return top, second.sub_(third).sub_(fourth)

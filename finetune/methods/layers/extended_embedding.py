"""A frozen embedding table with new, trainable rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Rows(nn.Module):
    """New embeddings [n, width] as an fp32 parameter."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(start.detach().float().clone(), requires_grad=False)

    def forward(self) -> Tensor:
        return self.rows


class Directions(Rows):
    """Embeddings m v / |v| with a trained v [n, width] and a fixed norm m: only the direction is learned.

    arXiv:2512.13672 also fixes the norm, but steps on the sphere; here the parametrisation keeps the norm.
    """

    def __init__(self, start: Tensor, norm: Tensor) -> None:
        super().__init__(start)
        self.norm: Tensor
        self.register_buffer("norm", norm.float(), persistent=False)

    def forward(self) -> Tensor:
        return self.norm * nn.functional.normalize(self.rows, dim=-1)


class ExtendedEmbedding(nn.Module):
    """A frozen embedding table, with new rows for token ids from `first` on. The output has the table's dtype."""

    def __init__(self, base_layer: nn.Embedding, first: int, new: Rows) -> None:
        super().__init__()
        self.base_layer, self.first, self.new = base_layer, first, new  # the base first: it sets the encoder's dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, length] -> [B, length, width]. The new rows get a zero gradient if no prompt uses them."""
        mine = ids >= self.first
        held = self.base_layer(ids.masked_fill(mine, 0))
        new = self.new().to(held.dtype)[(ids - self.first).clamp(min=0)]
        return torch.where(mine[..., None], new, held)

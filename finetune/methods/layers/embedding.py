"""New rows beside a frozen table of embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Rows(nn.Module):
    """New embeddings [n, width]; the parameter is fp32."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(start.detach().float().clone(), requires_grad=False)

    def forward(self) -> Tensor:
        return self.rows


class Directions(Rows):
    """m v / |v| for a parameter v [n, width]: only the direction is learned (arXiv:2512.13672 fixes the norm, too, and
    steps on the sphere; here the sphere is in the parametrisation)."""

    def __init__(self, start: Tensor, norm: Tensor) -> None:
        super().__init__(start)
        self.norm: Tensor
        self.register_buffer("norm", norm.float(), persistent=False)

    def forward(self) -> Tensor:
        return self.norm * nn.functional.normalize(self.rows, dim=-1)


class ExtendedEmbedding(nn.Module):
    """A frozen table of embeddings, and new rows for the ids from `first` on; dtype of the table."""

    def __init__(self, base_layer: nn.Embedding, first: int, new: Rows) -> None:
        super().__init__()
        self.base_layer, self.first, self.new = base_layer, first, new  # the base first: its dtype is the encoder's

    def forward(self, ids: Tensor) -> Tensor:
        """[B, length] -> [B, length, width]; the rows get a gradient (of zero) also where no prompt has them."""
        mine = ids >= self.first
        held = self.base_layer(ids.masked_fill(mine, 0))
        new = self.new().to(held.dtype)[(ids - self.first).clamp(min=0)]
        return torch.where(mine[..., None], new, held)

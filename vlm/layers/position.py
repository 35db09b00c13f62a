"""Where a token stands: rotary embedding of queries and keys. (Learned positions are a plain table.)

Letters: B batch, H heads, T query, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """Rotary position embedding (Su et al., 2021), half-split form.

    Channel pairs (i, i + D/2) turn by position * base^(-2i/D); a dot product then depends on distance alone.
    The table holds cos and sin for every position of the context, computed in fp32.
    """

    def __init__(self, head_dim: int, context: int, base: float) -> None:
        super().__init__()
        frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angle = torch.outer(torch.arange(context, dtype=torch.float32), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.cos: Tensor
        self.sin: Tensor

    def forward(self, x_BHTD: Tensor, start: int) -> Tensor:
        """Turn `x_BHTD`, whose first position is `start`."""
        T = x_BHTD.shape[2]
        cos, sin = self.cos[start : start + T].to(x_BHTD.dtype), self.sin[start : start + T].to(x_BHTD.dtype)
        a, b = x_BHTD.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

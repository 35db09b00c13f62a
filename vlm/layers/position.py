"""Where a token stands: rotary embedding of queries and keys. (Learned positions are a plain table.)

Letters: B batch, H heads, T query, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

Angles = tuple[Tensor, Tensor]
"""cos and sin of each position and pair of channels, (..., T, D/2) each: made once a pass, used by every layer."""


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

    def forward(self, positions: Tensor | slice, dtype: torch.dtype) -> Angles:
        """Angles of positions: a slice all rows share, (T, D/2), or a row's own (B, T), (B, 1, T, D/2)."""
        cos, sin = self.cos[positions].to(dtype), self.sin[positions].to(dtype)
        return (cos[:, None], sin[:, None]) if cos.ndim == 3 else (cos, sin)


def apply_rotary(x_BHTD: Tensor, angles: Angles) -> Tensor:
    """Queries or keys, turned by the angles of their positions."""
    cos, sin = angles
    a, b = x_BHTD.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

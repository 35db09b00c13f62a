"""Rotary position embeddings of queries and keys, over the positions of a sequence or the rows and columns of a grid.

Learned positions are a plain embedding table and need no class here.

Letters in tensor names: batch (B), heads (H), queries (T), width of a head (D), patches of a picture (N).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vlm.config import AxialPositionConfig

Angles = tuple[Tensor, Tensor]
"""Cosines (..., T, D/2) and sines (..., T, D/2) for each position and each pair of channels.

All layers of a forward pass share the same tensors."""


class Rotary(nn.Module):
    """Rotary position embedding (Su et al., 2021) in its half-split form.

    Channels i and i + D/2 are rotated by the angle position * base^(-2i/D). The dot product of a query and a key then
    depends only on the distance of their positions. The tables hold the cosine and the sine of the angles of every
    position of the context, computed in fp32.
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
        """Return the angles (T, D/2) for a Python slice of positions, or (B, 1, T, D/2) for a tensor (B, T) of
        positions.
        """
        cos, sin = self.cos[positions].to(dtype), self.sin[positions].to(dtype)
        return (cos[:, None], sin[:, None]) if cos.ndim == 3 else (cos, sin)


class AxialRotary(nn.Module):
    """Rotary position embedding over the rows and columns of a square grid of patches (Heo et al., 2024).

    The first D/4 pairs of channels are rotated by the angle of one coordinate, and the other D/4 pairs by the angle of
    the other coordinate. The `extra` tokens before the patches are not rotated.
    """

    def __init__(self, config: AxialPositionConfig, *, head_dim: int, side: int, extra: int) -> None:
        super().__init__()
        frequency = config.base ** (-torch.arange(head_dim // 4, dtype=torch.float32) / (head_dim // 4))
        index = torch.arange(side, dtype=torch.float32)
        if config.coordinates == "centred":
            coordinate = 2 * math.pi * (2 * (index + 0.5 + config.offset) / side - 1)
        else:
            coordinate = (index + config.offset) / side * (config.grid or side)
        row, column = torch.meshgrid(coordinate, coordinate, indexing="ij")
        pair = (row, column) if config.first == "row" else (column, row)
        angle = torch.cat([torch.outer(each.flatten(), frequency) for each in pair], dim=1)
        angle = torch.cat((torch.zeros(extra, head_dim // 2), angle))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.cos: Tensor
        self.sin: Tensor

    def forward(self, dtype: torch.dtype) -> Angles:
        """Return the angles (extra + N, D/2) of all tokens."""
        return self.cos.to(dtype), self.sin.to(dtype)


def apply_rotary(x_BHTD: Tensor, angles: Angles) -> Tensor:
    """Rotate queries or keys by the angles of their positions."""
    cos, sin = angles
    a, b = x_BHTD.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

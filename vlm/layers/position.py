"""Rotary position embeddings of queries and keys, and biases of attention scores that depend on the distance
between two patches.

Learned positions are a plain table of vectors and need no class in this module.

Letters in tensor names: batch (B), layers (L), heads (H), queries (T), width of a head (D), side of the patch grid (S),
patches of a picture (N, which is S * S).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.config import AxialPositionConfig
from vlm.layers.mlp import PlainMlp

Angles = tuple[Tensor, Tensor]
"""Cosines (..., T, D/2) and sines (..., T, D/2) for each position and each pair of channels.

All layers of a forward pass share these tensors. With `MixedRotary`, however, each layer has its own tensors."""


class Rotary(nn.Module):
    """Rotary position embedding (Su et al., 2021) in its half-split form.

    Channels i and i + D/2 are rotated by the angle position * base^(-2i/D). After the rotation, the positions of a
    query and a key influence their dot product only through the distance between the positions. The tables hold the
    cosine and the sine of the angles of every position of the context, computed in fp32.
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


class MixedRotary(nn.Module):
    """Rotary position embedding over rows and columns with learned frequencies (Heo et al., 2024).

    A pair of channels is rotated by the angle column * frequency[0] + row * frequency[1]. Each head of each layer has
    its own frequencies. The `extra` tokens before the patches are not rotated.
    """

    INITIAL_BASE = 10.0

    def __init__(self, *, depth: int, num_heads: int, head_dim: int, side: int, extra: int) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.zeros(2, depth, num_heads, head_dim // 2))
        index = torch.arange(side, dtype=torch.float32)
        row, column = torch.meshgrid(index, index, indexing="ij")
        positions = torch.stack((column.flatten(), row.flatten()))
        self.register_buffer("positions", torch.cat((torch.zeros(2, extra), positions), dim=1), persistent=False)
        self.positions: Tensor

    @torch.no_grad()
    def initialize(self) -> None:
        """Initialise the frequencies. Draw a random direction for each head of each layer. The frequencies of the first
        half of the pairs of channels get this direction. The frequencies of the other pairs get the perpendicular
        direction.
        """
        _, depth, num_heads, pairs = self.frequency.shape
        size = self.INITIAL_BASE ** (-torch.arange(pairs // 2, dtype=torch.float32, device="cpu") / (pairs // 2))
        direction_LH1 = 2 * math.pi * torch.rand(depth, num_heads, 1, dtype=torch.float32, device="cpu")
        for axis, shift in enumerate((0.0, -math.pi / 2)):  # the shift of -pi / 2 makes the cosine a sine
            halves = [size * torch.cos(direction_LH1 + shift + turn) for turn in (0.0, math.pi / 2)]
            self.frequency[axis] = torch.cat(halves, dim=-1)

    def forward(self, dtype: torch.dtype) -> list[Angles]:
        """Return the angles (H, extra + N, D/2) of all tokens for each layer."""
        column_T1, row_T1 = self.positions.float()[..., None]
        along_columns, along_rows = self.frequency.float()[..., None, :]
        angle_LHTD = column_T1 * along_columns + row_T1 * along_rows
        return list(zip(angle_LHTD.cos().to(dtype), angle_LHTD.sin().to(dtype), strict=True))


class RelativeBias(nn.Module):
    """Bias of attention scores that an MLP computes from the distance of two patches (Liu et al., 2022).

    The inputs of the MLP are sign(d) * log(1 + |d|) for the distance d in rows and in columns. The scores of the
    `extra` tokens before the patches get no bias.
    """

    def __init__(self, num_heads: int, mlp_width: int, *, side: int, extra: int) -> None:
        super().__init__()
        self.mlp = PlainMlp(2, mlp_width, F.relu, bias=True, out_width=num_heads)
        self.extra = extra
        index = torch.arange(side)
        distance = torch.arange(1 - side, side, dtype=torch.float32)
        distance = distance.sign() * distance.abs().log1p()
        inputs = torch.stack(torch.meshgrid(distance, distance, indexing="ij"), dim=-1)
        self.register_buffer("inputs", inputs, persistent=False)
        self.register_buffer("offset_SS", index[:, None] - index + side - 1, persistent=False)
        self.inputs: Tensor
        self.offset_SS: Tensor

    def forward(self, dtype: torch.dtype) -> Tensor:
        """Return the bias (H, extra + N, extra + N) of the scores of each query (dimension 1) and key (dimension 2)."""
        table = self.mlp(self.inputs.to(self.mlp.up.weight.dtype)).permute(2, 0, 1)
        rows, columns = self.offset_SS[:, None, :, None], self.offset_SS[None, :, None, :]
        bias_HNN = table[:, rows, columns].flatten(3, 4).flatten(1, 2)
        return F.pad(bias_HNN, (self.extra, 0, self.extra, 0)).to(dtype)


def apply_rotary(x_BHTD: Tensor, angles: Angles) -> Tensor:
    """Rotate queries or keys by the angles of their positions."""
    cos, sin = angles
    a, b = x_BHTD.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

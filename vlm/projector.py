"""Projectors that map encoder features to the decoder's width and reduce the number of features.

The linear projector and the MLP projector are plain layers and need no class in this module.

Letters in tensor names: pictures (B), patches (N), latents (L), width (W).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlm.layers.attention import CrossAttention


class PixelShuffle(nn.Module):
    """Projector that concatenates each square of factor x factor patches and then applies a linear layer.

    The layer maps (B, N, W) to (B, N / factor^2, out_width). InternVL (Chen et al., 2024) calls this operation pixel
    unshuffle: fewer positions have more channels.
    """

    def __init__(self, width: int, out_width: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(width * factor**2, out_width, bias=False)

    def forward(self, x_BNW: Tensor) -> Tensor:
        """Project the patches of a square grid, which are given row by row."""
        B, N, W = x_BNW.shape
        side, f = math.isqrt(N) // self.factor, self.factor
        squares = x_BNW.view(B, side, f, side, f, W).transpose(2, 3)
        return self.linear(squares.reshape(B, side * side, f * f * W))


class ResamplerBlock(nn.Module):
    """Block of a resampler, in which the latents attend to the picture and to each other and then go through an MLP."""

    def __init__(self, attention: CrossAttention, mlp: nn.Module, *, width: int) -> None:
        super().__init__()
        self.attention = attention
        self.memory_norm, self.attention_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.mlp = mlp

    def forward(self, latents_BLW: Tensor, x_BNW: Tensor) -> Tensor:
        """Return the latents after one block."""
        queries_BLW = self.attention_norm(latents_BLW)
        memory = torch.cat((self.memory_norm(x_BNW), queries_BLW), dim=1)
        latents_BLW = latents_BLW + self.attention(queries_BLW, self.attention.keys_values(memory))
        return latents_BLW + self.mlp(self.mlp_norm(latents_BLW))


class Resampler(nn.Module):
    """Perceiver resampler that turns any number of patches into a fixed number of features (Alayrac et al., 2022)."""

    def __init__(self, blocks: Sequence[ResamplerBlock], norm: nn.Module, out: nn.Linear, *, num_latents: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(num_latents, out.in_features))
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.out = norm, out

    def forward(self, x_BNW: Tensor) -> Tensor:
        """Resample features (B, N, width) to (B, L, out_width)."""
        latents_BLW = self.latents.expand(len(x_BNW), -1, -1)
        for block in self.blocks:
            latents_BLW = block(latents_BLW, x_BNW)
        return self.out(self.norm(latents_BLW))

"""The encoder: a picture becomes a sequence of features.

Letters: B batch, C channels, N patches (and class token), W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vlm.layers.attention import CrossAttention
from vlm.layers.block import Block

Select = Literal["cls", "mean", "patches", "attention"]


class PatchStem(nn.Conv2d):
    """One convolution, stride = kernel = patch (Dosovitskiy et al., 2020): (B, 3, H, W) to (B, width, H/p, W/p)."""

    def __init__(self, patch_size: int, width: int, *, bias: bool) -> None:
        super().__init__(3, width, kernel_size=patch_size, stride=patch_size, bias=bias)


class ConvStem(nn.Sequential):
    """Stride-2 3x3 convolutions, then a 1x1 to the width (Xiao et al., 2021).

    Group norm instead of batch norm: a picture's features never depend on the batch it came in.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        layers: list[nn.Module] = []
        before = 3
        for after in channels:
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.GroupNorm(1, after), nn.GELU()]
            before = after
        super().__init__(*layers, nn.Conv2d(before, width, 1))


class AttentionPool(nn.Module):
    """One learned query attends to all features, then an MLP (Zhai et al., 2022): (B, N, W) to (B, 1, W)."""

    def __init__(self, attention: CrossAttention, norm: nn.Module, mlp: nn.Module, *, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.attention, self.norm, self.mlp = attention, norm, mlp

    def forward(self, x_BNW: Tensor) -> Tensor:
        """The one feature."""
        query_B1W = self.query.expand(len(x_BNW), -1, -1)
        seen_B1W = self.attention(query_B1W, self.attention.keys_values(x_BNW))
        return seen_B1W + self.mlp(self.norm(seen_B1W))


class VisionEncoder(nn.Module):
    """Stem, class token and registers, positions, blocks, norm, selection.

    Positions cover all tokens, or the patches alone; `pre_norm` and `norm` are identities where a model has none.
    """

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[Block],
        pre_norm: nn.Module,
        norm: nn.Module,
        pool: AttentionPool | None,
        *,
        num_patches: int,
        width: int,
        class_token: bool,
        registers: int,
        position_on: Literal["all", "patches"],
        select: Select,
        dropout: float,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        self.registers = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.num_extra = class_token + registers
        self.position_on = position_on
        self.position = nn.Parameter(
            torch.zeros(1, num_patches + (self.num_extra if position_on == "all" else 0), width)
        )
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.pool = pool
        self.select = select

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Features of normalised pixels: (B, N, W) patches, or (B, 1, W) for the other selections."""
        x_BNW = self.pre_norm(self.dropout(self._embed(self.stem(pixels_BCHW).flatten(2).transpose(1, 2))))
        for block in self.blocks:
            x_BNW = block(x_BNW, mask=None, causal=False)
        x_BNW = self.norm(x_BNW)
        if self.pool is not None:
            return self.pool(x_BNW)
        if self.select == "cls":
            return x_BNW[:, :1]
        patches_BNW = x_BNW[:, self.num_extra :]
        return patches_BNW.mean(dim=1, keepdim=True) if self.select == "mean" else patches_BNW

    def _embed(self, x_BNW: Tensor) -> Tensor:
        extra = [token.expand(len(x_BNW), -1, -1) for token in (self.class_token, self.registers) if token is not None]
        if self.position_on == "patches":
            return torch.cat((*extra, x_BNW + self.position), dim=1)
        return torch.cat((*extra, x_BNW), dim=1) + self.position

"""The encoder: a picture becomes a sequence of features.

Letters: B batch, C channels, N patches (and class token), W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vlm.layers.block import Block


class PatchStem(nn.Conv2d):
    """One convolution, stride = kernel = patch (Dosovitskiy et al., 2020): (B, 3, H, W) to (B, width, H/p, W/p)."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__(3, width, kernel_size=patch_size, stride=patch_size)


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


class VisionEncoder(nn.Module):
    """Stem, positions, blocks, norm, selection."""

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[Block],
        norm: nn.Module,
        *,
        num_patches: int,
        width: int,
        class_token: bool,
        select: Literal["cls", "mean", "patches"],
        dropout: float,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        self.position = nn.Parameter(torch.zeros(1, num_patches + class_token, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.select = select

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Features of normalised pixels: (B, N, W) patches, or (B, 1, W) for `cls` and `mean`."""
        x_BNW = self.stem(pixels_BCHW).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x_BNW = torch.cat((self.class_token.expand(x_BNW.shape[0], -1, -1), x_BNW), dim=1)
        x_BNW = self.dropout(x_BNW + self.position)
        for block in self.blocks:
            x_BNW = block(x_BNW, mask=None, causal=False)
        x_BNW = self.norm(x_BNW)
        if self.select == "cls":
            return x_BNW[:, :1]
        patches_BNW = x_BNW[:, 1:] if self.class_token is not None else x_BNW
        return patches_BNW.mean(dim=1, keepdim=True) if self.select == "mean" else patches_BNW

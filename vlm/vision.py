"""Vision encoder, which turns a picture into a sequence of features.

Letters in tensor names: batch (B), channels (C), tokens (N), width (W). The tokens of the encoder are the class token,
the registers and the patches. The input of the attention pooling has only the patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vlm.errors import UserError
from vlm.layers.attention import CrossAttention
from vlm.layers.block import Block
from vlm.layers.position import Angles, AxialRotary, MixedRotary, RelativeBias

Select = Literal["cls", "mean", "patches", "attention"]


class PatchStem(nn.Conv2d):
    """Convolution whose kernel size and stride are the patch size p (Dosovitskiy et al., 2020).

    The layer maps (B, 3, H, W) to (B, width, H/p, W/p).
    """

    def __init__(self, patch_size: int, width: int, *, bias: bool) -> None:
        super().__init__(3, width, kernel_size=patch_size, stride=patch_size, bias=bias)


class ConvBlock(nn.Module):
    """Residual block of two 3x3 convolutions with group norms (He et al., 2015)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.branch = nn.Sequential(
            first, nn.GroupNorm(1, channels), nn.GELU(), second, nn.GroupNorm(1, channels), nn.GELU()
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Add the output of the convolutions to the input."""
        residual_BCHW: Tensor = self.branch(x_BCHW)
        return x_BCHW + residual_BCHW


class ConvStem(nn.Sequential):
    """Stem of 3x3 convolutions with stride 2 and a final 1x1 convolution to the width (Xiao et al., 2021).

    Residual blocks may follow each stride-2 convolution. Group norm replaces batch norm, so the features of a picture
    do not depend on the other pictures of the batch.
    """

    def __init__(self, channels: Sequence[int], blocks: Sequence[int], width: int) -> None:
        layers: list[nn.Module] = []
        inputs = 3
        for outputs, count in zip(channels, blocks, strict=True):
            convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.GroupNorm(1, outputs), nn.GELU(), *(ConvBlock(outputs) for _ in range(count))]
            inputs = outputs
        super().__init__(*layers, nn.Conv2d(inputs, width, 1))


class AttentionPool(nn.Module):
    """Attention pooling from (B, N, W) to (B, 1, W), with one learned query and an MLP (Zhai et al., 2022)."""

    def __init__(self, attention: CrossAttention, norm: nn.Module, mlp: nn.Module, *, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.attention, self.norm, self.mlp = attention, norm, mlp

    def forward(self, x_BNW: Tensor) -> Tensor:
        """Pool the patch vectors of each picture into a single feature."""
        query_B1W = self.query.expand(len(x_BNW), -1, -1)
        pooled_B1W = self.attention(query_B1W, self.attention.keys_values(x_BNW))
        return pooled_B1W + self.mlp(self.norm(pooled_B1W))


class VisionEncoder(nn.Module):
    """Vision transformer with stem, class token, registers, position embeddings, blocks, norms and an output selection.

    Learned position embeddings are added to all tokens, only to the patches, or to no token (if `position_on` is None).
    With `rotary`, queries and keys are also rotated by the positions of the patches. The modules in `relative`, one
    per block or one for all blocks, compute biases of the attention scores. If the model has no norm before the blocks,
    `pre_norm` is an identity. If the model has no norm after the blocks, `norm` is an identity.
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
        position_on: Literal["all", "patches"] | None,
        select: Select,
        dropout: float,
        rotary: AxialRotary | MixedRotary | None = None,
        relative: Sequence[RelativeBias] = (),
    ) -> None:
        super().__init__()
        self.stem = stem
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        self.registers = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.num_extra = class_token + registers
        self.position_on = position_on
        rows = num_patches + (self.num_extra if position_on == "all" else 0)
        self.position = nn.Parameter(torch.zeros(1, rows, width)) if position_on else None
        self.rotary = rotary
        self.relative = nn.ModuleList(relative)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.pool = pool
        self.select = select

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Compute the features of normalised pixels.

        The result has shape (B, number of patches, W) with `select: patches`, and shape (B, 1, W) otherwise.
        """
        x_BNW = self.pre_norm(self.dropout(self._embed(self.stem(pixels_BCHW).flatten(2).transpose(1, 2))))
        angles, biases = self._angles(x_BNW.dtype), self._biases(x_BNW.dtype)
        for block, block_angles, bias_HNN in zip(self.blocks, angles, biases, strict=True):
            x_BNW = block(x_BNW, mask=bias_HNN, causal=False, angles=block_angles)
        x_BNW = self.norm(x_BNW)
        if self.select == "cls":
            return x_BNW[:, :1]
        patches_BNW = x_BNW[:, self.num_extra :]
        if self.pool is not None:
            return self.pool(patches_BNW)
        return patches_BNW.mean(dim=1, keepdim=True) if self.select == "mean" else patches_BNW

    def _angles(self, dtype: torch.dtype) -> list[Angles] | list[None]:
        """Return the rotary angles of each block, or None for each block without rotary positions."""
        if self.rotary is None:
            return [None] * len(self.blocks)
        return self.rotary(dtype) if isinstance(self.rotary, MixedRotary) else [self.rotary(dtype)] * len(self.blocks)

    def _biases(self, dtype: torch.dtype) -> list[Tensor] | list[None]:
        """Return the biases (H, N, N) of the attention scores of each block, or None for each block without biases."""
        if not self.relative:
            return [None] * len(self.blocks)
        return [bias(dtype) for bias in self.relative] * (len(self.blocks) // len(self.relative))

    def _embed(self, x_BNW: Tensor) -> Tensor:
        extra = [token.expand(len(x_BNW), -1, -1) for token in (self.class_token, self.registers) if token is not None]
        if self.position is None:
            return torch.cat((*extra, x_BNW), dim=1)
        if self.position_on == "patches":
            return torch.cat((*extra, x_BNW + self.position), dim=1)
        return torch.cat((*extra, x_BNW), dim=1) + self.position


class NoEncoder(nn.Module):
    """Module without weights that replaces the vision encoder in a text-only model and refuses pictures."""

    position: None = None
    pool: None = None

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Refuse pictures.

        Raises:
            UserError: always.
        """
        raise no_pictures()


def no_pictures() -> UserError:
    """Return the error for a picture that is given to a text-only model."""
    return UserError(
        "the model reads no pictures",
        where="model.text_only",
        got="true: the model is a decoder that was trained on text alone",
        fix="train a captioner that starts from this decoder (train.start_from), or give only a prompt",
    )

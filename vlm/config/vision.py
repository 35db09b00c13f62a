"""Configs of the vision encoder, and of the projector from the encoder's width to the decoder's width."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from vlm.config.base import ADDED_LATER, Config
from vlm.config.transformer import Activation, DenseMlpConfig, TransformerConfig


class PatchStemConfig(Config):
    """Stem of one convolution with stride and kernel size `patch_size` (Dosovitskiy et al., 2020).

    Attributes:
        patch_size: height and width of a patch in pixels.
        bias: whether the convolution has a bias.
    """

    kind: Literal["patch"]
    patch_size: PositiveInt
    bias: bool = True

    @property
    def stride(self) -> int:
        """Distance between neighbouring positions of the patch grid, in pixels of the picture."""
        return self.patch_size


class ConvStemConfig(Config):
    """Stem of stride-2 convolutions, which trains faster and more stably than a patch stem (Xiao et al., 2021).

    Attributes:
        channels: number of output channels of each stride-2 convolution.
        blocks: list with the number of residual blocks (He et al., 2015) after each stride-2 convolution, or an empty
            list for no blocks.
    """

    kind: Literal["conv"]
    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    blocks: Annotated[tuple[NonNegativeInt, ...], ADDED_LATER] = ()

    @property
    def stride(self) -> int:
        """Distance between neighbouring positions of the patch grid, in pixels of the picture."""
        return 1 << len(self.channels)

    @model_validator(mode="after")
    def _check_blocks(self) -> Self:
        if self.blocks and len(self.blocks) != len(self.channels):
            raise ValueError(
                f"blocks has {len(self.blocks)} numbers, but channels has {len(self.channels)}: use equal lengths"
            )
        return self


StemConfig = Annotated[PatchStemConfig | ConvStemConfig, Field(discriminator="kind")]


class VisionConfig(Config):
    """Config of the vision encoder: stem, class token, registers, transformer, and the choice of the encoder's output.

    Attributes:
        stem: config of the first layers, which turn a picture into a grid of patch vectors.
        transformer: config of the blocks that process the patch vectors.
        class_token: whether a learned class token comes before the patches.
        registers: number of learned register tokens after the class token. The projector does not receive the outputs
            of register tokens (Darcet et al., 2023).
        position_on: whether learned position vectors are added to `all` tokens or only to the `patches`.
        pre_norm: whether a norm comes before the first block (CLIP).
        post_norm: whether a norm comes after the last block.
        select: output of the encoder that the projector receives. `patches` selects all patches, `mean` the mean of all
            patches, and `cls` the class token. `attention` selects one vector that a learned query pools from the
            patches (Zhai et al., 2022).
    """

    stem: StemConfig
    transformer: TransformerConfig
    class_token: bool = False
    registers: NonNegativeInt = 0
    position_on: Literal["all", "patches"] = "all"
    pre_norm: bool = False
    post_norm: bool = True
    select: Literal["cls", "mean", "patches", "attention"] = "patches"

    @model_validator(mode="after")
    def _check_select_and_position(self) -> Self:
        if self.select == "cls" and not self.class_token:
            raise ValueError("select: cls needs a class token: set class_token: true")
        if self.select == "attention" and self.transformer.mlp.kind != "plain":
            raise ValueError(
                "select: attention needs mlp.kind: plain, because the pooling layer uses the same MLP config"
            )
        if self.transformer.position.kind == "rotary":
            raise ValueError(
                "position.kind: rotary is for text only: use learned, axial, mixed or relative positions in the encoder"
            )
        if self.transformer.attention.windows != (None,):
            raise ValueError("attention.windows is supported in the decoder only: set windows to [null] in the encoder")
        return self


class LinearProjectorConfig(Config):
    """Projector that is one linear layer, from the encoder's width to the decoder's width."""

    kind: Literal["linear"] = "linear"


class MlpProjectorConfig(Config):
    """Projector of two linear layers with an activation function in between (LLaVA 1.5).

    Attributes:
        mlp_width: number of channels between the two linear layers.
        activation: activation function between the two linear layers.
    """

    kind: Literal["mlp"]
    mlp_width: PositiveInt
    activation: Activation = "gelu"


class PixelShuffleProjectorConfig(Config):
    """Projector that joins factor x factor patches into one vector and applies a linear layer (InternVL).

    Attributes:
        factor: side length, in patches, of the square of patches that becomes one feature vector.
    """

    kind: Literal["pixel_shuffle"]
    factor: Annotated[int, Field(ge=2)] = 2


class ResamplerProjectorConfig(Config):
    """Perceiver resampler (Alayrac et al., 2022), in which learned queries attend to patches and to each other.

    Attributes:
        num_latents: number of learned queries, which is also the number of feature vectors of a picture.
        depth: number of layers.
        num_heads: number of attention heads.
        head_dim: number of channels of an attention head.
        mlp: config of the MLP in each layer.
    """

    kind: Literal["resampler"]
    num_latents: PositiveInt = 64
    depth: PositiveInt = 6
    num_heads: PositiveInt = 8
    head_dim: PositiveInt = 64
    mlp: DenseMlpConfig


ProjectorConfig = Annotated[
    LinearProjectorConfig | MlpProjectorConfig | PixelShuffleProjectorConfig | ResamplerProjectorConfig,
    Field(discriminator="kind"),
]

"""The eye: stem, encoder, and the projector that hands its features to the decoder."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from vlm.config.base import Config
from vlm.config.transformer import Activation, DenseMlpConfig, TransformerConfig


class PatchStemConfig(Config):
    """One convolution with stride = kernel = patch_size (Dosovitskiy et al., 2020)."""

    kind: Literal["patch"]
    patch_size: PositiveInt
    bias: bool = True

    @property
    def stride(self) -> int:
        """Pixels of the picture per step of the patch grid."""
        return self.patch_size


class ConvStemConfig(Config):
    """A few stride-2 convolutions (Xiao et al., 2021): trains faster and steadier than one large patch."""

    kind: Literal["conv"]
    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]

    @property
    def stride(self) -> int:
        """Pixels of the picture per step of the patch grid."""
        return 1 << len(self.channels)


StemConfig = Annotated[PatchStemConfig | ConvStemConfig, Field(discriminator="kind")]


class VisionConfig(Config):
    """The encoder: stem, class token and registers, transformer, and which outputs the decoder gets to see.

    Attributes:
        stem: picture to patches.
        transformer: over patches.
        class_token: a learned token in front.
        registers: learned tokens that no one reads (Darcet et al., 2023), after the class token.
        position_on: `all` tokens have a position, or the `patches` alone.
        pre_norm: a norm before the first block (CLIP).
        post_norm: a norm after the last block.
        select: what the projector gets: `patches`, their `mean`, the class token (`cls`), or what one learned query
            attends to (`attention`; Zhai et al., 2022).
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
    def _consistent(self) -> Self:
        if self.select == "cls" and not self.class_token:
            raise ValueError("select: cls needs class_token: true")
        if self.select == "attention" and self.transformer.mlp.kind != "plain":
            raise ValueError("select: attention needs mlp.kind: plain, which its own MLP is shaped like")
        if self.transformer.position.kind != "learned":
            raise ValueError("the patch grid takes learned positions: rotary ones here would be one-dimensional")
        if self.transformer.attention.windows != (None,):
            raise ValueError("an encoder sees all of its picture: attention.windows is the decoder's")
        return self


class LinearProjectorConfig(Config):
    """One linear layer from encoder width to decoder width."""

    kind: Literal["linear"] = "linear"


class MlpProjectorConfig(Config):
    """Linear, activation, linear (LLaVA 1.5)."""

    kind: Literal["mlp"]
    mlp_width: PositiveInt
    activation: Activation = "gelu"


class PixelShuffleProjectorConfig(Config):
    """Each square of factor x factor patches becomes one slot, channels side by side, then linear (InternVL)."""

    kind: Literal["pixel_shuffle"]
    factor: Annotated[int, Field(ge=2)] = 2


class ResamplerProjectorConfig(Config):
    """Perceiver resampler (Alayrac et al., 2022): `num_latents` learned queries attend to patches and themselves."""

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

"""The shape of a model as data: every axis of variation is a small frozen config, picked by `kind`.

Families are points in this space (YAML under conf/model/), never classes. Imports neither torch nor Spark, so the
driver, the executors and the command line can read a model's shape for free.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

Probability = Annotated[float, Field(ge=0, lt=1)]


class Config(BaseModel):
    """Base of every config: frozen, unknown keys forbidden."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ImageConfig(Config):
    """How a picture becomes pixels. The same numbers serve shards, training and captioning."""

    size: PositiveInt
    resize: Literal["stretch", "crop", "pad"] = "stretch"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


class CharsConfig(Config):
    """One token a character. Characters outside the alphabet become the unknown token."""

    kind: Literal["chars"]
    alphabet: Annotated[str, Field(min_length=1)]


class BpeConfig(Config):
    """Byte-level BPE learned from the training captions: no unknown characters, any language."""

    kind: Literal["bpe"]
    vocab_size: Annotated[int, Field(ge=261)] = 512


TextConfig = Annotated[CharsConfig | BpeConfig, Field(discriminator="kind")]


class LayerNormConfig(Config):
    """LayerNorm (Ba et al., 2016)."""

    kind: Literal["layer"] = "layer"
    eps: float = 1e-5


class RmsNormConfig(Config):
    """RMSNorm (Zhang and Sennrich, 2019)."""

    kind: Literal["rms"]
    eps: float = 1e-6


NormConfig = Annotated[LayerNormConfig | RmsNormConfig, Field(discriminator="kind")]


class LearnedPositionConfig(Config):
    """One learned vector a position, added to the input."""

    kind: Literal["learned"] = "learned"


class RotaryPositionConfig(Config):
    """Rotary embedding of queries and keys (Su et al., 2021)."""

    kind: Literal["rotary"]
    base: float = 10_000.0


PositionConfig = Annotated[LearnedPositionConfig | RotaryPositionConfig, Field(discriminator="kind")]


class AttentionConfig(Config):
    """Multi-head attention; fewer key-value heads than heads is grouped-query attention."""

    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    bias: bool = False

    @model_validator(mode="after")
    def _grouped(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        return self


Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]


class PlainMlpConfig(Config):
    """Two linear layers and an activation."""

    kind: Literal["plain"] = "plain"
    mlp_width: PositiveInt
    activation: Activation = "gelu"
    bias: bool = True


class GatedMlpConfig(Config):
    """Gated linear unit (Shazeer, 2020): SwiGLU with silu, GeGLU with gelu_tanh."""

    kind: Literal["gated"]
    mlp_width: PositiveInt
    activation: Activation = "silu"
    bias: bool = False


MlpConfig = Annotated[PlainMlpConfig | GatedMlpConfig, Field(discriminator="kind")]


class TransformerConfig(Config):
    """A stack of pre-norm blocks; the same words for the encoder and the decoder."""

    width: PositiveInt
    depth: PositiveInt
    attention: AttentionConfig
    mlp: MlpConfig
    norm: NormConfig = LayerNormConfig()
    position: PositionConfig = LearnedPositionConfig()
    dropout: Probability = 0.0

    @model_validator(mode="after")
    def _rotary_pairs(self) -> Self:
        if self.position.kind == "rotary" and self.attention.head_dim % 2:
            raise ValueError(f"rotary positions turn pairs of channels: head_dim {self.attention.head_dim} is odd")
        return self


class PatchStemConfig(Config):
    """One convolution with stride = kernel = patch_size (Dosovitskiy et al., 2020)."""

    kind: Literal["patch"]
    patch_size: PositiveInt

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
    """The encoder: stem, optional class token, transformer, and which outputs the decoder gets to see."""

    stem: StemConfig
    transformer: TransformerConfig
    class_token: bool = False
    select: Literal["cls", "mean", "patches"] = "patches"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.select == "cls" and not self.class_token:
            raise ValueError("select: cls needs class_token: true")
        if self.transformer.position.kind != "learned":
            raise ValueError("the patch grid takes learned positions: rotary ones here would be one-dimensional")
        return self


class LinearProjectorConfig(Config):
    """One linear layer from encoder width to decoder width."""

    kind: Literal["linear"] = "linear"


class MlpProjectorConfig(Config):
    """Linear, GELU, linear (LLaVA 1.5)."""

    kind: Literal["mlp"]
    mlp_width: PositiveInt


ProjectorConfig = Annotated[LinearProjectorConfig | MlpProjectorConfig, Field(discriminator="kind")]


class DecoderConfig(Config):
    """The language model: token table, transformer, output head."""

    context: PositiveInt
    transformer: TransformerConfig
    tie_embeddings: bool = False


class CausalMaskConfig(Config):
    """Every position sees itself and what came before."""

    kind: Literal["causal"] = "causal"


class PrefixMaskConfig(Config):
    """Picture and prompt see each other freely; the answer is causal (prefix-LM, PaliGemma)."""

    kind: Literal["prefix"]


MaskConfig = Annotated[CausalMaskConfig | PrefixMaskConfig, Field(discriminator="kind")]


class GenerationConfig(Config):
    """Decoding settings; temperature 0 is greedy."""

    max_new_tokens: PositiveInt = 48
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_k: PositiveInt | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: int = 0


class ModelConfig(Config):
    """A whole vision-language model. With its tokenizer file and weights it is enough to rebuild it anywhere."""

    image: ImageConfig
    text: TextConfig
    vision: VisionConfig
    projector: ProjectorConfig = LinearProjectorConfig()
    decoder: DecoderConfig
    mask: MaskConfig = CausalMaskConfig()
    generation: GenerationConfig = GenerationConfig()

    @property
    def num_patches(self) -> int:
        """Patches of one picture, before any selection."""
        return (self.image.size // self.vision.stem.stride) ** 2

    @property
    def num_slots(self) -> int:
        """Places one picture takes in the decoder's sequence."""
        return self.num_patches if self.vision.select == "patches" else 1

    @model_validator(mode="after")
    def _fits(self) -> Self:
        stride = self.vision.stem.stride
        if self.image.size % stride:
            raise ValueError(f"image.size {self.image.size} is not a multiple of the stem's stride {stride}")
        room = self.decoder.context - self.num_slots - 1
        if room < self.generation.max_new_tokens:
            raise ValueError(
                f"decoder.context {self.decoder.context} leaves {room} places after {self.num_slots} image slots and "
                f"the start token, fewer than generation.max_new_tokens {self.generation.max_new_tokens}"
            )
        return self

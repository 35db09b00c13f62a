"""A whole model as data: decoder, fusion, mask, decoding settings, and how the parts fit.

Imports neither torch nor Spark, so the driver, the executors and the command line can read a model's shape for free.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from vlm.config.base import Config
from vlm.config.image import ImageConfig
from vlm.config.text import TextConfig
from vlm.config.transformer import DenseMlpConfig, TransformerConfig
from vlm.config.vision import LinearProjectorConfig, ProjectorConfig, VisionConfig


class DecoderConfig(Config):
    """The language model: token table, transformer, output head.

    Attributes:
        context: positions it can hold.
        transformer: over the sequence.
        tie_embeddings: the output head is the token table.
        scale_embeddings: token vectors are multiplied by sqrt(width) (Vaswani et al., 2017); slots are not.
        soft_cap: logits are squeezed into (-soft_cap, soft_cap) by tanh (Gemma Team, 2024).
    """

    context: PositiveInt
    transformer: TransformerConfig
    tie_embeddings: bool = False
    scale_embeddings: bool = False
    soft_cap: PositiveFloat | None = None

    @model_validator(mode="after")
    def _no_layer_without_past(self) -> Self:
        if self.transformer.layer_scale is not None:
            raise ValueError("layer_scale is an axis of the encoder")
        return self


class SlotsFusionConfig(Config):
    """A picture enters the sequence: its features take the places of slots."""

    kind: Literal["slots"] = "slots"


class CrossFusionConfig(Config):
    """A picture stays outside (Alayrac et al., 2022): one slot marks its place, gated blocks look at its features.

    A position sees the last picture before it. The gates start closed, so that training starts from the bare decoder.

    Attributes:
        every: a gated block before every so many blocks of the decoder.
        num_heads: heads of the cross-attention.
        head_dim: width of a head.
        mlp: of the gated block.
    """

    kind: Literal["cross_attention"]
    every: PositiveInt = 1
    num_heads: PositiveInt = 8
    head_dim: PositiveInt = 64
    mlp: DenseMlpConfig


FusionConfig = Annotated[SlotsFusionConfig | CrossFusionConfig, Field(discriminator="kind")]


class CausalMaskConfig(Config):
    """Every position sees itself and what came before."""

    kind: Literal["causal"] = "causal"


class PrefixMaskConfig(Config):
    """Picture and prompt see each other freely; the answer is causal (prefix-LM, PaliGemma)."""

    kind: Literal["prefix"]


MaskConfig = Annotated[CausalMaskConfig | PrefixMaskConfig, Field(discriminator="kind")]


class GenerationConfig(Config):
    """Decoding settings; their meaning and order are those of transformers' `generate`.

    Attributes:
        max_new_tokens: of an answer, the end token included.
        temperature: scores are divided by it before a draw; 0 is greedy.
        top_k: draw among the k best.
        top_p: draw among the best whose probabilities together reach it (Holtzman et al., 2019).
        min_p: draw among those with at least this share of the best one's probability (Nguyen et al., 2024).
        repetition_penalty: above 1, tokens of prompt and answer become less likely (Keskar et al., 2019).
        num_beams: beginnings that a search keeps; 1 is no search.
        length_penalty: an answer of a search is worth its log-probability / length ** length_penalty.
        stop: an answer ends once its text contains one of these, and is cut off there.
        seed: of draws.
    """

    max_new_tokens: PositiveInt = 48
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_k: PositiveInt | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: PositiveFloat = 1.0
    num_beams: PositiveInt = 1
    length_penalty: float = 1.0
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    seed: int = 0

    @model_validator(mode="after")
    def _searches_or_draws(self) -> Self:
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError(
                f"num_beams {self.num_beams} searches for the likeliest answer, temperature {self.temperature} draws "
                "one: set num_beams 1 or temperature 0"
            )
        return self


class ModelConfig(Config):
    """A whole vision-language model. With its tokenizer file and weights it is enough to rebuild it anywhere."""

    image: ImageConfig
    text: TextConfig
    vision: VisionConfig
    projector: ProjectorConfig = LinearProjectorConfig()
    decoder: DecoderConfig
    fusion: FusionConfig = SlotsFusionConfig()
    mask: MaskConfig = CausalMaskConfig()
    generation: GenerationConfig = GenerationConfig()

    @property
    def num_patches(self) -> int:
        """Patches of one picture, before any selection."""
        return (self.image.size // self.vision.stem.stride) ** 2

    @property
    def num_features(self) -> int:
        """Vectors the projector makes of one picture."""
        if self.projector.kind == "resampler":
            return self.projector.num_latents
        if self.vision.select != "patches":
            return 1
        shrink = self.projector.factor if self.projector.kind == "pixel_shuffle" else 1
        return self.num_patches // shrink**2

    @property
    def num_slots(self) -> int:
        """Places one picture takes in the decoder's sequence."""
        return self.num_features if self.fusion.kind == "slots" else 1

    @model_validator(mode="after")
    def _fits(self) -> Self:
        stride = self.vision.stem.stride
        if self.image.size % stride:
            raise ValueError(f"image.size {self.image.size} is not a multiple of the stem's stride {stride}")
        if self.projector.kind == "pixel_shuffle":
            side = self.image.size // stride
            if self.vision.select != "patches" or side % self.projector.factor:
                raise ValueError(
                    f"projector.factor {self.projector.factor} needs select: patches and divides their grid of {side}"
                )
        depth = self.decoder.transformer.depth
        if self.fusion.kind == "cross_attention" and depth % self.fusion.every:
            raise ValueError(f"decoder depth {depth} is not a multiple of fusion.every {self.fusion.every}")
        room = self.decoder.context - self.num_slots - 1
        if room < self.generation.max_new_tokens:
            raise ValueError(
                f"decoder.context {self.decoder.context} leaves {room} places after {self.num_slots} image slots and "
                f"the start token, fewer than generation.max_new_tokens {self.generation.max_new_tokens}"
            )
        return self

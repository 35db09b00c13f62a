"""Config of a whole model, and of its decoder, fusion, attention mask and generation.

The validators check that the parts fit together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from vlm.config.base import ADDED_LATER, Config, read_error_message
from vlm.config.image import ImageConfig
from vlm.config.text import TextConfig
from vlm.config.transformer import DenseMlpConfig, TransformerConfig
from vlm.config.vision import LinearProjectorConfig, ProjectorConfig, VisionConfig
from vlm.errors import ArgumentError, ConfigError, did_you_mean


class DecoderConfig(Config):
    """The language model: token embeddings, transformer and output head.

    Attributes:
        context: largest length of the decoder's input, which is image slots plus text tokens.
        transformer: config of the transformer blocks.
        tie_embeddings: whether the output head uses the weights of the token embedding table.
        scale_embeddings: whether token embeddings are multiplied by sqrt(width) (Vaswani et al., 2017). Picture
            features are never multiplied by this factor.
        soft_cap: bound of the absolute logits, which become soft_cap * tanh(logit / soft_cap) (Gemma Team, 2024), or
            null for no bound.
    """

    context: PositiveInt
    transformer: TransformerConfig
    tie_embeddings: bool = False
    scale_embeddings: bool = False
    soft_cap: PositiveFloat | None = None

    @model_validator(mode="after")
    def _check_layer_scale(self) -> Self:
        if self.transformer.layer_scale is not None:
            raise ValueError("layer_scale is supported in the encoder only: set layer_scale to null in the decoder")
        kind = self.transformer.position.kind
        if kind not in ("learned", "rotary"):
            raise ValueError(
                f"position.kind: {kind} is for patch grids only: use rotary or learned positions in the decoder"
            )
        return self


class SlotsFusionConfig(Config):
    """Picture features are inserted into the decoder's sequence, one feature per image slot."""

    kind: Literal["slots"] = "slots"


class CrossFusionConfig(Config):
    """Gated cross-attention blocks read the picture features (Flamingo, Alayrac et al., 2022).

    One image slot in the sequence marks the position of each picture. A token attends only to the last picture before
    the token. The gates start at zero, so training starts from the unchanged decoder.

    Attributes:
        every: number of decoder blocks that follow each gated cross-attention block.
        num_heads: number of heads of the cross-attention.
        head_dim: number of channels of a head.
        mlp: config of the MLP in each gated cross-attention block.
    """

    kind: Literal["cross_attention"]
    every: PositiveInt = 1
    num_heads: PositiveInt = 8
    head_dim: PositiveInt = 64
    mlp: DenseMlpConfig


FusionConfig = Annotated[SlotsFusionConfig | CrossFusionConfig, Field(discriminator="kind")]


class CausalMaskConfig(Config):
    """Every position attends only to itself and to earlier positions."""

    kind: Literal["causal"] = "causal"


class PrefixMaskConfig(Config):
    """Picture and prompt attend to each other in both directions. In the answer, each token attends only to itself and
    to earlier positions (as in PaliGemma).
    """

    kind: Literal["prefix"]


MaskConfig = Annotated[CausalMaskConfig | PrefixMaskConfig, Field(discriminator="kind")]


class GenerationConfig(Config):
    """Generation settings. All settings except `stop` and `seed` have the same meaning as in transformers' `generate`.

    The settings are applied in the same order as in `generate`. No setting may be infinite or NaN. The settings
    `top_k`, `top_p`, `min_p` and `seed` have an effect only if `temperature` is above 0. The setting `length_penalty`
    has an effect only if `num_beams` is above 1.

    Attributes:
        max_new_tokens: largest length of an answer in tokens, including the end token.
        temperature: number by which logits are divided before sampling, or 0 to always choose the most likely token.
        top_k: number of tokens among which sampling chooses: the `top_k` most likely tokens. Null stands for all
            tokens.
        top_p: total probability of the tokens among which sampling chooses: the most likely tokens that together reach
            `top_p` (Holtzman et al., 2019).
        min_p: lowest probability of a token that sampling may choose, as a fraction of the probability of the most
            likely token (Nguyen et al., 2024).
        repetition_penalty: penalty on tokens that the prompt or the answer already contains. A penalty above 1 makes
            repeated tokens less likely (Keskar et al., 2019).
        num_beams: number of beams of beam search, at most 1024, or 1 for no beam search.
        length_penalty: exponent in the score of beam search, which is log-probability / length ** length_penalty. A
            larger exponent favours longer answers.
        stop: a text, or a list of texts, that ends an answer. The answer is cut before the first stop text in the
            answer.
        seed: random seed of sampling.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    max_new_tokens: PositiveInt = 48
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_k: PositiveInt | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=1e-100, le=1e100)] = 1.0
    num_beams: Annotated[int, Field(gt=0, le=1024)] = 1
    length_penalty: Annotated[float, Field(ge=-1e300, le=1e300)] = 1.0
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    seed: int = 0

    @field_validator("stop", mode="before")
    @classmethod
    def _to_stop_texts(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_beams_or_sampling(self) -> Self:
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError(
                f"num_beams {self.num_beams} and temperature {self.temperature} exclude each other, because beam "
                "search does not sample: set num_beams 1 or temperature 0"
            )
        return self

    def changed(self, changes: Mapping[str, Any], *, where: str = "generation settings") -> GenerationConfig:
        """Return a copy in which some settings have new values.

        Args:
            changes: dict from names of settings to their new values.
            where: source of the changes, for the error message, such as "generation settings".

        Raises:
            ArgumentError: `changes` is not a dict.
            ConfigError: a name in `changes` is not the name of a setting, a value is invalid, or two settings exclude
                each other.

        Example:
            >>> import vlm
            >>> vlm.GenerationConfig(temperature=0.7).changed({"top_k": 20}).top_k
            20
        """
        if not isinstance(changes, Mapping):
            raise ArgumentError(
                "the argument `changes` cannot be used",
                got=type(changes).__name__,
                fix="pass a dict from names of settings to values",
            )
        check_setting_names(changes, where=where)
        try:
            return GenerationConfig.model_validate(self.model_dump() | dict(changes))
        except ValidationError as error:
            raise ConfigError(
                "the generation settings cannot be used",
                where=where,
                got=read_error_message(error, GenerationConfig),
                fix="change the setting in the message; if two settings exclude each other, change one of them",
            ) from None


SYNONYMS = {"do_sample": "temperature", "max_length": "max_new_tokens"}
"""Dict from the name of a setting in transformers to the name of the setting that Lakesight has instead."""


def check_setting_names(names: Iterable[object], arguments: Collection[str] = (), *, where: str) -> None:
    """Check that each name is the name of a generation setting.

    Args:
        names: names to check.
        arguments: names of other arguments of the function that was called. The error may suggest one of these names.
        where: source of the names, for the error message.

    Raises:
        ConfigError: a name is not the name of a setting. If a valid name is similar, the error suggests the valid name.
    """
    for name in names:
        if name not in GenerationConfig.model_fields:
            valid = [*GenerationConfig.model_fields, *arguments]
            raise ConfigError(
                "there is no such generation setting",
                where=where,
                got=str(name) + did_you_mean(SYNONYMS.get(str(name), str(name)), valid),
                fix=f"choose one of the settings {', '.join(GenerationConfig.model_fields)}",
            )


def settings_without_effect(settings: GenerationConfig, before: GenerationConfig) -> list[str]:
    """Return one sentence for each setting that has no effect because of the value of another setting.

    A setting is left out if its value is the value in `before` or the default value.
    """
    needed: dict[str, str] = {}
    if settings.temperature == 0:
        needed |= dict.fromkeys(
            ("top_k", "top_p", "min_p", "seed"), "temperature is 0: set temperature above 0 to sample"
        )
    if settings.num_beams == 1:
        needed["length_penalty"] = "num_beams is 1: set num_beams above 1 for beam search"
    return [
        f"the setting {name} {getattr(settings, name)} has no effect, because {reason}"
        for name, reason in needed.items()
        if getattr(settings, name) not in (getattr(before, name), GenerationConfig.model_fields[name].default)
    ]


class ModelConfig(Config):
    """Config of a whole vision-language model. Config, tokenizer file and weights are enough to rebuild the model.

    Attributes:
        text: config of the tokenizer.
        projector: config of the projector from the encoder's outputs to vectors for the decoder.
        fusion: how the decoder receives the picture.
        mask: which positions of the decoder's sequence attend to which other positions.
        text_only: true for a decoder without encoder and projector, which is trained on a source of kind `text`. With
            `text_only`, the sections `image`, `vision`, `projector` and `fusion` build no part of the model. These
            sections describe a captioner that may later be trained from this decoder.
    """

    image: ImageConfig
    text: TextConfig
    vision: VisionConfig
    projector: ProjectorConfig = LinearProjectorConfig()
    decoder: DecoderConfig
    fusion: FusionConfig = SlotsFusionConfig()
    mask: MaskConfig = CausalMaskConfig()
    generation: GenerationConfig = GenerationConfig()
    text_only: Annotated[bool, ADDED_LATER] = False

    @property
    def num_patches(self) -> int:
        """Number of patches of one picture, before `vision.select` is applied."""
        return (self.image.size // self.vision.stem.stride) ** 2

    @property
    def num_features(self) -> int:
        """Number of feature vectors that the projector outputs for one picture."""
        if self.projector.kind == "resampler":
            return self.projector.num_latents
        if self.vision.select != "patches":
            return 1
        shrink = self.projector.factor if self.projector.kind == "pixel_shuffle" else 1
        return self.num_patches // shrink**2

    @property
    def num_slots(self) -> int:
        """Number of positions that one picture takes in the decoder's sequence; 0 for a model without pictures."""
        if self.text_only:
            return 0
        return self.num_features if self.fusion.kind == "slots" else 1

    @model_validator(mode="after")
    def _check_parts_fit(self) -> Self:
        stride = self.vision.stem.stride
        if self.image.size % stride:
            raise ValueError(f"image.size {self.image.size} is not a multiple of the stem's stride {stride}")
        if self.projector.kind == "pixel_shuffle":
            side = self.image.size // stride
            if self.vision.select != "patches" or side % self.projector.factor:
                raise ValueError(
                    f"projector.factor {self.projector.factor} needs vision.select: patches, and must divide the side "
                    f"of the patch grid, {side}"
                )
        depth = self.decoder.transformer.depth
        if self.fusion.kind == "cross_attention" and depth % self.fusion.every:
            raise ValueError(f"decoder depth {depth} is not a multiple of fusion.every {self.fusion.every}")
        if self.text_only and self.fusion.kind != "slots":
            raise ValueError(
                f"fusion.kind {self.fusion.kind} needs pictures, but text_only is true: set fusion.kind to slots"
            )
        free = self.decoder.context - self.num_slots - 1
        if free < self.generation.max_new_tokens:
            raise ValueError(
                f"decoder.context {self.decoder.context} has {free} positions after {self.num_slots} image slots and "
                f"the start token, but generation.max_new_tokens {self.generation.max_new_tokens} needs more positions"
            )
        return self

    def with_generation(self, settings: GenerationConfig, *, where: str) -> ModelConfig:
        """Return a copy with other generation settings. `where` names the model in the error message.

        Raises:
            ConfigError: the decoder's context is too short for `max_new_tokens`.
        """
        try:
            return ModelConfig.model_validate(self.model_dump(by_alias=True) | {"generation": settings.model_dump()})
        except ValidationError as error:
            raise ConfigError(
                "the generation settings do not fit the model",
                where=where,
                got=read_error_message(error, ModelConfig),
                fix="lower max_new_tokens",
            ) from None

"""PaliGemma 1 (Beyer et al., 2024) and 2 (Steiner et al., 2024), made of SigLIP, one linear layer, and Gemma 1 or 2.

The weight table uses the tensor names of the published files. In memory, transformers 5 uses a second set of names. In
the files that it saves, transformers 5 uses a third set of names. `LEGACY_PREFIXES` maps the names of transformers 5 to
the published names.
"""

from __future__ import annotations

from collections.abc import Callable

from vlm.config import ModelConfig
from vlm.weights.accounting import ENCODER_WITHOUT_EFFECT
from vlm.weights.config_fields import (
    ConfigField,
    Settings,
    constant,
    default_options,
    in_section,
    required,
    same,
    value_at,
    write_only,
)
from vlm.weights.family import Family
from vlm.weights.rules import Drop, WeightTable, rename
from vlm.weights.tables import gemma, siglip
from vlm.weights.tensor_sizes import axis_size, sizes_in_section, with_prefix

VISION, TEXT = "vision_tower.vision_model.", "language_model."
LEGACY_PREFIXES = (
    ("model.vision_tower.vision_model.", VISION),
    ("model.vision_tower.", VISION),
    (VISION, VISION),
    ("vision_tower.", VISION),
    ("model.language_model.", f"{TEXT}model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", f"{TEXT}lm_head."),
)


def table(config: ModelConfig) -> WeightTable:
    """Return the weight table of the whole model."""
    vision, text = siglip.tower(config).with_prefix(VISION), gemma.table(config).with_prefix(TEXT)
    return WeightTable(
        rules=(*vision.rules, rename("multi_modal_projector.linear.*", "projector.*"), *text.rules),
        drops=(*vision.drops, *text.drops, Drop("*.position_ids", "constant position indices")),
        ties=text.ties,
    )


def _fields(text: tuple[ConfigField, ...], text_type: str, defaults: Settings) -> tuple[ConfigField, ...]:
    width = value_at("decoder.transformer.width")
    return (
        constant("mask.kind", "prefix"),
        constant("fusion.kind", "slots"),
        constant("projector.kind", "linear"),
        same("decoder.transformer.width", "projection_dim"),
        same("decoder.tie_embeddings", "tie_word_embeddings"),
        *default_options(),
        write_only("hidden_size", width),
        write_only("vision_config", lambda _: {"model_type": "siglip_vision_model"}),
        *in_section("vision_config", (*siglip.FIELDS, write_only("projection_dim", width)), siglip.DEFAULTS),
        write_only("text_config", lambda _: {"model_type": text_type}),
        *in_section("text_config", (*text, required("use_bidirectional_attention", True)), defaults),
    )


def _select_by_text_type(text_type: str) -> Callable[[Settings], Settings | None]:
    """Return the `select_settings` of one PaliGemma version. PaliGemma 1 and 2 differ in the decoder's `model_type`."""

    def settings_of(settings: Settings) -> Settings | None:
        if settings.get("model_type") != "paligemma":
            return None
        found = (settings.get("text_config") or {}).get("model_type", "gemma")
        return settings if found == text_type else None

    return settings_of


FIXED_SETTINGS = {"architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma"}
DEFAULTS = {"projection_dim": 2048, "tie_word_embeddings": True}
WITHOUT_EFFECT = {
    **gemma.WITHOUT_EFFECT,
    **dict.fromkeys(
        ("/hidden_size", "vision_config.projection_dim", "vision_config.projector_hidden_act", "_vocab_size"),
        "is not used by transformers",
    ),
    **dict.fromkeys(("num_image_tokens", "num_positions"), "follows from the size of the picture"),
    **dict.fromkeys(
        ("image_token_index", "image_token_id", "ignore_index"), "marks picture positions, which need no token here"
    ),
    **{f"vision_config.{key}": reason for key, reason in ENCODER_WITHOUT_EFFECT.items()},
}


def _version(name: str, text_type: str, text: tuple[ConfigField, ...], defaults: Settings) -> Family:
    """Return the family of one PaliGemma version. PaliGemma 1 and 2 differ in the decoder only."""
    return Family(
        name,
        "model",
        _select_by_text_type(text_type),
        _fields(text, text_type, defaults),
        table,
        FIXED_SETTINGS,
        defaults=DEFAULTS,
        without_effect=WITHOUT_EFFECT,
        sizes=(
            axis_size("projection_dim", "multi_modal_projector.linear.weight", 0),
            *sizes_in_section("vision_config", with_prefix(siglip.SIZES, VISION), siglip.DEFAULTS),
            *sizes_in_section("text_config", with_prefix(gemma.SIZES, TEXT), defaults),
        ),
        legacy_prefixes=LEGACY_PREFIXES,
        vocab_section="text_config",
        newline_after_empty_prompt=True,
        image_processor="SiglipImageProcessor",
        image_id_key="image_token_index",
    )


FAMILIES = (
    _version("paligemma", "gemma", gemma.FIELDS_1, gemma.DEFAULTS_1),
    _version("paligemma2", "gemma2", gemma.FIELDS_2, gemma.DEFAULTS_2),
)

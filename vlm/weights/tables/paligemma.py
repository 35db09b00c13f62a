"""PaliGemma 1 (Beyer et al., 2024) and 2 (Steiner et al., 2024): SigLIP, one linear layer, Gemma 1 or 2.

Names are those of published files; transformers 5 calls the same tensors otherwise in memory, and writes yet others.
"""

from __future__ import annotations

from collections.abc import Callable

from vlm.config import ModelConfig
from vlm.weights.facts import Fact, Settings, always, at, inside, same, tell
from vlm.weights.family import Family
from vlm.weights.rules import Drop, Table, rename
from vlm.weights.tables import gemma, siglip

VISION, TEXT = "vision_tower.vision_model.", "language_model."
OLDER = (
    ("model.vision_tower.vision_model.", VISION),
    ("model.vision_tower.", VISION),
    (VISION, VISION),
    ("vision_tower.", VISION),
    ("model.language_model.", f"{TEXT}model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", f"{TEXT}lm_head."),
)


def table(config: ModelConfig) -> Table:
    """Names of the file and of the whole model."""
    vision, text = siglip.tower(config).under(VISION), gemma.table(config).under(TEXT)
    return Table(
        rules=(*vision.rules, rename("multi_modal_projector.linear.*", "projector.*"), *text.rules),
        drops=(*vision.drops, *text.drops, Drop("*.position_ids", "the numbers of the positions, a constant")),
        ties=text.ties,
    )


def _facts(text: tuple[Fact, ...], text_type: str, defaults: Settings) -> tuple[Fact, ...]:
    width = at("decoder.transformer.width")
    return (
        always("mask.kind", "prefix"),
        always("fusion.kind", "slots"),
        always("projector.kind", "linear"),
        same("decoder.transformer.width", "projection_dim"),
        tell("hidden_size", width),
        tell("vision_config", lambda _: {"model_type": "siglip_vision_model"}),
        *inside("vision_config", (*siglip.FACTS, tell("projection_dim", width)), siglip.DEFAULTS),
        tell("text_config", lambda _: {"model_type": text_type}),
        *inside("text_config", text, defaults),
    )


def _with(text_type: str) -> Callable[[Settings], Settings | None]:
    """Both versions say `paligemma`: the decoder tells them apart."""

    def settings_of(settings: Settings) -> Settings | None:
        found = settings.get("text_config", {}).get("model_type", "gemma")
        return settings if settings.get("model_type") == "paligemma" and found == text_type else None

    return settings_of


HEADER = {"architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma"}
DEFAULTS = {"projection_dim": 2048}


def _version(name: str, text_type: str, text: tuple[Fact, ...], defaults: Settings) -> Family:
    """A version by its decoder: all else is the same."""
    return Family(
        name,
        "model",
        _with(text_type),
        _facts(text, text_type, defaults),
        table,
        header=HEADER,
        defaults=DEFAULTS,
        older=OLDER,
        text="text_config",
        image_key="image_token_index",
    )


FAMILIES = (
    _version("paligemma", "gemma", gemma.FACTS_1, gemma.DEFAULTS_1),
    _version("paligemma2", "gemma2", gemma.FACTS_2, gemma.DEFAULTS_2),
)

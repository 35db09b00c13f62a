"""Vision encoders of SigLIP (Zhai et al., 2023) and SigLIP 2 (Tschannen et al., 2025) in transformers.

Neither SigLIP nor SigLIP 2 has a class token. If a model has `select: attention`, a learned query pools the features.
NaFlex, the variant of SigLIP 2 for any aspect ratio, stores the stem as a linear layer and resizes position embeddings
bilinearly. Lakesight uses only square pictures. SigLIP 2 with a fixed resolution is published in the format of SigLIP.
"""

from __future__ import annotations

import math

from vlm.config import ModelConfig
from vlm.weights.accounting import ENCODER_WITHOUT_EFFECT
from vlm.weights.config_fields import VISION_DEFAULTS, ConfigField, Settings, constant, value_at, write_only
from vlm.weights.family import transformers_family
from vlm.weights.rules import Drop, Rule, WeightTable, add_axes, patch_projection, position_table, rename, split
from vlm.weights.tables.clip import TOWER_FIELDS, block_rules, tower_sizes
from vlm.weights.tensor_sizes import axis_size, with_prefix

DEFAULTS = {
    **VISION_DEFAULTS,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
SHARED_FIELDS = (
    *TOWER_FIELDS,
    constant("vision.stem.bias", True),
    constant("vision.class_token", False),
    constant("vision.pre_norm", False),
    constant("vision.post_norm", True),
    write_only("vision_use_head", lambda config: config.vision.select == "attention"),
)
FIELDS = (*SHARED_FIELDS, write_only("image_size", value_at("image.size")))
SQUARE_GRID = "a square number"


def square_grid(settings: Settings) -> str:
    """Return SQUARE_GRID if the patches of a picture form a square, and the number of patches otherwise."""
    count = int(settings.get("num_patches", 256))
    return SQUARE_GRID if math.isqrt(count) ** 2 == count else str(count)


FIELDS_2 = (
    *SHARED_FIELDS,
    write_only("num_patches", value_at("num_patches")),
    ConfigField("", "num_patches", lambda _: SQUARE_GRID, square_grid),
)

SIZES = tower_sizes(extra=0)
SIZES_2 = (
    *(size for size in SIZES if "patch_size" not in size.key),  # the stem is a linear layer
    axis_size("num_patches", "embeddings.position_embedding.weight", -2),
)


def _shared_rules(config: ModelConfig) -> tuple[Rule, ...]:
    width = config.vision.transformer.width
    pool = [f"encoder.pool.attention.{part}.*" for part in ("q", "kv")]
    return (
        *block_rules(config),
        rename("head.probe", "encoder.pool.query"),
        split("head.attention.in_proj_*", pool, (width, 2 * width)),
        rename("head.attention.out_proj.*", "encoder.pool.attention.out.*"),
        rename("head.layernorm.*", "encoder.pool.norm.*"),
        rename("head.mlp.fc1.*", "encoder.pool.mlp.up.*"),
        rename("head.mlp.fc2.*", "encoder.pool.mlp.out.*"),
    )


DROPS = (
    Drop("embeddings.position_ids", "constant position indices"),
    Drop("head.*", "the attention pooling, because vision.select of the model is not attention"),
)
WHOLE_MODEL_DROPS = (
    Drop("text_model.*", "the text tower"),
    Drop("logit_*", "a weight of the contrastive loss"),
)


def tower(config: ModelConfig) -> WeightTable:
    """Return the weight table of SigLIP's vision encoder, with tensor names without a prefix."""
    return WeightTable(
        rules=(
            rename("embeddings.patch_embedding.*", "encoder.stem.*"),
            position_table(add_axes("embeddings.position_embedding.weight", "encoder.position", 1), extra=0),
            *_shared_rules(config),
        ),
        drops=DROPS,
    )


def tower_2(config: ModelConfig) -> WeightTable:
    """Return the weight table of SigLIP 2's vision encoder, with tensor names without a prefix."""
    stem = config.vision.stem
    assert stem.kind == "patch", "config fields are compared before a table is built"
    position = add_axes("embeddings.position_embedding.weight", "encoder.position", 1)
    return WeightTable(
        rules=(
            patch_projection("embeddings.patch_embedding.weight", "encoder.stem.weight", stem.patch_size),
            rename("embeddings.patch_embedding.bias", "encoder.stem.bias"),
            position_table(position, extra=0, mode="bilinear"),
            *_shared_rules(config),
        ),
        drops=DROPS,
    )


def table(config: ModelConfig) -> WeightTable:
    """Return the weight table of SigLIP's vision encoder, alone or in a whole SigLIP model."""
    return tower(config).with_prefix("vision_model.").with_drops(*WHOLE_MODEL_DROPS)


def table_2(config: ModelConfig) -> WeightTable:
    """Return the weight table of SigLIP 2's vision encoder, alone or in a whole SigLIP 2 model."""
    return tower_2(config).with_prefix("vision_model.").with_drops(*WHOLE_MODEL_DROPS)


FAMILIES = (
    transformers_family(
        "siglip",
        "encoder",
        architecture="SiglipVisionModel",
        sections={"siglip_vision_model": "", "siglip": "vision_config"},
        fields=FIELDS,
        table=table,
        defaults=DEFAULTS,
        without_effect=ENCODER_WITHOUT_EFFECT,
        sizes=with_prefix(SIZES, "vision_model."),
        prefix="vision_model.",
        image_processor="SiglipImageProcessor",
    ),
    transformers_family(
        "siglip2",
        "encoder",
        architecture="Siglip2VisionModel",
        sections={"siglip2_vision_model": "", "siglip2": "vision_config"},
        fields=FIELDS_2,
        table=table_2,
        defaults=DEFAULTS,
        without_effect=ENCODER_WITHOUT_EFFECT,
        sizes=with_prefix(SIZES_2, "vision_model."),
        prefix="vision_model.",
        image_processor="Siglip2ImageProcessor",
    ),
)

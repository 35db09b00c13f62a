"""Vision transformers (Dosovitskiy et al., 2020) in transformers, with or without a classifier."""

from __future__ import annotations

from vlm.config import ModelConfig
from vlm.weights.accounting import ENCODER_WITHOUT_EFFECT
from vlm.weights.config_fields import (
    VISION_DEFAULTS,
    attention_biases,
    constant,
    same,
    value_at,
    vision_transformer,
    write_only,
)
from vlm.weights.family import transformers_family
from vlm.weights.rules import Drop, WeightTable, concat, position_table, rename
from vlm.weights.tensor_sizes import axis_size, has_tensor, num_layers, num_positions, patch_size, with_prefix

ATTENTION = "vision.transformer.attention"
DEFAULTS = {
    **VISION_DEFAULTS,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "qkv_bias": True,
}
FIELDS = (
    *vision_transformer(),
    constant("vision.stem.bias", True),
    constant("vision.class_token", True),
    constant("vision.position_on", "all"),
    constant("vision.pre_norm", False),
    constant("vision.post_norm", True),
    *attention_biases(ATTENTION, same(f"{ATTENTION}.bias", "qkv_bias"), out=True),
    write_only("image_size", value_at("image.size")),
)
SIZES = with_prefix(
    (
        axis_size("hidden_size", "embeddings.cls_token", -1),
        num_layers("num_hidden_layers", "encoder.layer.{i}.layernorm_before.weight"),
        axis_size("intermediate_size", "encoder.layer.0.intermediate.dense.weight", 0),
        patch_size("embeddings.patch_embeddings.projection.weight"),
        has_tensor("qkv_bias", "encoder.layer.0.attention.attention.query.bias"),
        num_positions("embeddings.position_embeddings", extra=1),
    ),
    "vit.",
)


def table(config: ModelConfig) -> WeightTable:
    """Return the weight table of the encoder."""
    width = config.vision.transformer.width
    attention = "encoder.layer.{i}.attention"
    names = WeightTable(
        rules=(
            rename("embeddings.patch_embeddings.projection.*", "encoder.stem.*"),
            rename("embeddings.cls_token", "encoder.class_token"),
            position_table(rename("embeddings.position_embeddings", "encoder.position"), extra=1),
            rename("encoder.layer.{i}.layernorm_before.*", "encoder.blocks.{i}.attention_norm.*"),
            concat(
                [f"{attention}.attention.{part}.*" for part in ("query", "key", "value")],
                "encoder.blocks.{i}.attention.qkv.*",
                (width, width, width),
            ),
            rename(f"{attention}.output.dense.*", "encoder.blocks.{i}.attention.out.*"),
            rename("encoder.layer.{i}.layernorm_after.*", "encoder.blocks.{i}.mlp_norm.*"),
            rename("encoder.layer.{i}.intermediate.dense.*", "encoder.blocks.{i}.mlp.up.*"),
            rename("encoder.layer.{i}.output.dense.*", "encoder.blocks.{i}.mlp.out.*"),
            rename("layernorm.*", "encoder.norm.*"),
        ),
        drops=(Drop("pooler.*", "a layer over the class token, used for classification"),),
    )
    return names.with_prefix("vit.").with_drops(Drop("classifier.*", "the head of a classifier"))


FAMILIES = (
    transformers_family(
        "vit",
        "encoder",
        architecture="ViTModel",
        sections={"vit": ""},
        fields=FIELDS,
        table=table,
        defaults=DEFAULTS,
        without_effect=ENCODER_WITHOUT_EFFECT,
        sizes=SIZES,
        prefix="vit.",
        image_processor="ViTImageProcessor",
    ),
)

"""Vision encoder of CLIP (Radford et al., 2021) in transformers: alone, with its projection, or in a whole CLIP model.

The encoder has a norm before the blocks, and a stem without bias. The norm after the blocks applies only to the class
token. A model that uses the patches therefore omits this norm (`post_norm: false`).
"""

from __future__ import annotations

from vlm.config import ModelConfig
from vlm.weights.accounting import ENCODER_WITHOUT_EFFECT
from vlm.weights.config_fields import (
    VISION_DEFAULTS,
    ConfigField,
    attention_biases,
    constant,
    value_at,
    vision_transformer,
    write_only,
)
from vlm.weights.family import transformers_family
from vlm.weights.rules import Drop, Rule, WeightTable, add_axes, concat, position_table, rename
from vlm.weights.tensor_sizes import TensorSize, axis_size, num_layers, num_positions, patch_size, with_prefix

DEFAULTS = {
    **VISION_DEFAULTS,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
# Config fields that CLIP and SigLIP share.
ATTENTION = "vision.transformer.attention"
TOWER_FIELDS = (*vision_transformer(), *attention_biases(ATTENTION, constant(f"{ATTENTION}.bias", True)))
FIELDS: tuple[ConfigField, ...] = (
    *TOWER_FIELDS,
    constant("vision.stem.bias", False),
    constant("vision.class_token", True),
    constant("vision.position_on", "all"),
    constant("vision.pre_norm", True),
    write_only("image_size", value_at("image.size")),
)


def tower_sizes(*, extra: int) -> tuple[TensorSize, ...]:
    """Return the sizes that CLIP and SigLIP share. `extra` is the number of rows of the position table that belong to
    no patch.
    """
    layer = "encoder.layers.{i}"
    return (
        axis_size("hidden_size", "embeddings.patch_embedding.weight", 0),
        num_layers("num_hidden_layers", f"{layer}.layer_norm1.weight"),
        axis_size("intermediate_size", "encoder.layers.0.mlp.fc1.weight", 0),
        patch_size("embeddings.patch_embedding.weight"),
        num_positions("embeddings.position_embedding.weight", extra=extra),
    )


def block_rules(config: ModelConfig) -> tuple[Rule, ...]:
    """Return the rules of the blocks and the last norm, which CLIP and SigLIP share."""
    width = config.vision.transformer.width
    return (
        rename("encoder.layers.{i}.layer_norm1.*", "encoder.blocks.{i}.attention_norm.*"),
        concat(
            [f"encoder.layers.{{i}}.self_attn.{part}_proj.*" for part in ("q", "k", "v")],
            "encoder.blocks.{i}.attention.qkv.*",
            (width, width, width),
        ),
        rename("encoder.layers.{i}.self_attn.out_proj.*", "encoder.blocks.{i}.attention.out.*"),
        rename("encoder.layers.{i}.layer_norm2.*", "encoder.blocks.{i}.mlp_norm.*"),
        rename("encoder.layers.{i}.mlp.fc1.*", "encoder.blocks.{i}.mlp.up.*"),
        rename("encoder.layers.{i}.mlp.fc2.*", "encoder.blocks.{i}.mlp.out.*"),
        rename("post_layernorm.*", "encoder.norm.*"),
    )


def table(config: ModelConfig) -> WeightTable:
    """Return the weight table of the vision encoder."""
    tower = WeightTable(
        rules=(
            rename("embeddings.patch_embedding.*", "encoder.stem.*"),
            add_axes("embeddings.class_embedding", "encoder.class_token", 2),
            position_table(add_axes("embeddings.position_embedding.weight", "encoder.position", 1), extra=1),
            rename("pre_layrnorm.*", "encoder.pre_norm.*"),
            *block_rules(config),
        ),
        drops=(
            Drop("embeddings.position_ids", "constant position indices"),
            Drop("post_layernorm.*", "the norm of the class token, because vision.post_norm of the model is false"),
        ),
    )
    return tower.with_prefix("vision_model.").with_drops(
        Drop("text_model.*", "the text tower"),
        Drop("*_projection.weight", "the projection into the joint space of text and pictures"),
        Drop("logit_scale", "a weight of the contrastive loss"),
    )


FAMILIES = (
    transformers_family(
        "clip",
        "encoder",
        architecture="CLIPVisionModel",
        sections={"clip_vision_model": "", "clip": "vision_config"},
        fields=FIELDS,
        table=table,
        defaults=DEFAULTS,
        without_effect=ENCODER_WITHOUT_EFFECT,
        sizes=with_prefix(tower_sizes(extra=1), "vision_model."),
        prefix="vision_model.",
        image_processor="CLIPImageProcessor",
    ),
)

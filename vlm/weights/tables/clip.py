"""CLIP's eye (Radford et al., 2021), as transformers publishes it: alone, with its projection, or in the whole of CLIP.

A norm before the blocks, a stem without bias. The norm after the blocks is meant for the class token alone: models that
look at patches leave it out (`post_norm: false`).
"""

from __future__ import annotations

from vlm.config import ModelConfig
from vlm.weights.facts import ACTIVATIONS, Fact, always, at, classic, heads, same, tell
from vlm.weights.family import Family, by_model_type
from vlm.weights.rules import Drop, Rule, Table, add_axes, concat, on_grid, rename

TRANSFORMER = "vision.transformer"
DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
# What CLIP and its relatives have in common.
TOWER = (
    *classic(TRANSFORMER),
    always("vision.stem.kind", "patch"),
    always("vision.registers", 0),
    always(f"{TRANSFORMER}.layer_scale", None),
    always(f"{TRANSFORMER}.attention.bias", True),
    same(f"{TRANSFORMER}.width", "hidden_size"),
    same(f"{TRANSFORMER}.depth", "num_hidden_layers"),
    *heads(f"{TRANSFORMER}.attention", "hidden_size", "num_attention_heads"),
    same(f"{TRANSFORMER}.mlp.mlp_width", "intermediate_size"),
    same(f"{TRANSFORMER}.mlp.activation", "hidden_act", ACTIVATIONS),
    same(f"{TRANSFORMER}.norm.eps", "layer_norm_eps"),
    same("vision.stem.patch_size", "patch_size"),
)
FACTS: tuple[Fact, ...] = (
    *TOWER,
    always("vision.stem.bias", False),
    always("vision.class_token", True),
    always("vision.position_on", "all"),
    always("vision.pre_norm", True),
    tell("image_size", at("image.size")),
)


def layers(config: ModelConfig) -> tuple[Rule, ...]:
    """The blocks of CLIP and its relatives."""
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


def table(config: ModelConfig) -> Table:
    """Names of the file and of the encoder."""
    tower = Table(
        rules=(
            rename("embeddings.patch_embedding.*", "encoder.stem.*"),
            add_axes("embeddings.class_embedding", "encoder.class_token", 2),
            on_grid(add_axes("embeddings.position_embedding.weight", "encoder.position", 1), extra=1),
            rename("pre_layrnorm.*", "encoder.pre_norm.*"),
            *layers(config),
        ),
        drops=(
            Drop("embeddings.position_ids", "the numbers of the positions, a constant"),
            Drop("post_layernorm.*", "the norm of the class token alone: the model's post_norm is false"),
        ),
    )
    return tower.under("vision_model.").dropping(
        Drop("text_model.*", "the text tower"),
        Drop("*_projection.weight", "the way to the space that text and pictures share"),
        Drop("logit_scale", "a weight of the contrastive loss"),
    )


FAMILIES = (
    Family(
        "clip",
        "encoder",
        by_model_type({"clip_vision_model": "", "clip": "vision_config"}),
        FACTS,
        table,
        header={"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"},
        defaults=DEFAULTS,
        home="vision_model.",
    ),
)

"""SigLIP's eye (Zhai et al., 2023) and SigLIP 2's (Tschannen et al., 2025), as transformers publishes them.

No class token; a learned query pools the features where a model asks for it (`select: attention`). SigLIP 2 for any
aspect ratio stores the stem as a linear layer and resizes positions bilinearly; here it sees square pictures. (SigLIP 2
of fixed resolution is published as SigLIP.)
"""

from __future__ import annotations

from vlm.config import ModelConfig
from vlm.weights.facts import always, at, tell
from vlm.weights.family import Family, by_model_type
from vlm.weights.rules import Drop, Rule, Table, add_axes, on_grid, patches, rename, split
from vlm.weights.tables.clip import TOWER, layers

DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
EITHER = (
    *TOWER,
    always("vision.stem.bias", True),
    always("vision.class_token", False),
    always("vision.pre_norm", False),
    always("vision.post_norm", True),
    tell("vision_use_head", lambda config: config.vision.select == "attention"),
)
FACTS = (*EITHER, tell("image_size", at("image.size")))
FACTS_2 = (*EITHER, tell("num_patches", at("num_patches")))


def _common(config: ModelConfig) -> tuple[Rule, ...]:
    width = config.vision.transformer.width
    pool = [f"encoder.pool.attention.{part}.*" for part in ("q", "kv")]
    return (
        *layers(config),
        rename("head.probe", "encoder.pool.query"),
        split("head.attention.in_proj_*", pool, (width, 2 * width)),
        rename("head.attention.out_proj.*", "encoder.pool.attention.out.*"),
        rename("head.layernorm.*", "encoder.pool.norm.*"),
        rename("head.mlp.fc1.*", "encoder.pool.mlp.up.*"),
        rename("head.mlp.fc2.*", "encoder.pool.mlp.out.*"),
    )


DROPS = (
    Drop("embeddings.position_ids", "the numbers of the positions, a constant"),
    Drop("head.*", "the pooling query: the model's select is not attention"),
)
WHOLE = (
    Drop("text_model.*", "the text tower"),
    Drop("logit_*", "a weight of the contrastive loss"),
)


def tower(config: ModelConfig) -> Table:
    """SigLIP's names, without the prefix of the file they stand in."""
    return Table(
        rules=(
            rename("embeddings.patch_embedding.*", "encoder.stem.*"),
            on_grid(add_axes("embeddings.position_embedding.weight", "encoder.position", 1), extra=0),
            *_common(config),
        ),
        drops=DROPS,
    )


def tower_2(config: ModelConfig) -> Table:
    """SigLIP 2's names, without the prefix of the file they stand in."""
    stem = config.vision.stem
    assert stem.kind == "patch", "the facts were compared before"
    position = add_axes("embeddings.position_embedding.weight", "encoder.position", 1)
    return Table(
        rules=(
            patches("embeddings.patch_embedding.weight", "encoder.stem.weight", stem.patch_size),
            rename("embeddings.patch_embedding.bias", "encoder.stem.bias"),
            on_grid(position, extra=0, mode="bilinear"),
            *_common(config),
        ),
        drops=DROPS,
    )


def table(config: ModelConfig) -> Table:
    """Names of the file and of the encoder."""
    return tower(config).under("vision_model.").dropping(*WHOLE)


def table_2(config: ModelConfig) -> Table:
    """Names of the file and of the encoder."""
    return tower_2(config).under("vision_model.").dropping(*WHOLE)


FAMILIES = (
    Family(
        "siglip",
        "encoder",
        by_model_type({"siglip_vision_model": "", "siglip": "vision_config"}),
        FACTS,
        table,
        header={"architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model"},
        defaults=DEFAULTS,
        home="vision_model.",
    ),
    Family(
        "siglip2",
        "encoder",
        by_model_type({"siglip2_vision_model": "", "siglip2": "vision_config"}),
        FACTS_2,
        table_2,
        header={"architectures": ["Siglip2VisionModel"], "model_type": "siglip2_vision_model"},
        defaults=DEFAULTS,
        home="vision_model.",
    ),
)

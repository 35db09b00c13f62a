"""Vision transformers (Dosovitskiy et al., 2020), as transformers publishes them, bare or with a classifier."""

from __future__ import annotations

from vlm.config import ModelConfig
from vlm.weights.facts import ACTIVATIONS, always, at, classic, heads, same, tell
from vlm.weights.family import Family, by_model_type
from vlm.weights.rules import Drop, Table, concat, on_grid, rename

TRANSFORMER = "vision.transformer"
DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "qkv_bias": True,
}
FACTS = (
    *classic(TRANSFORMER),
    always("vision.stem.kind", "patch"),
    always("vision.stem.bias", True),
    always("vision.class_token", True),
    always("vision.registers", 0),
    always("vision.position_on", "all"),
    always("vision.pre_norm", False),
    always("vision.post_norm", True),
    always(f"{TRANSFORMER}.layer_scale", None),
    same(f"{TRANSFORMER}.width", "hidden_size"),
    same(f"{TRANSFORMER}.depth", "num_hidden_layers"),
    *heads(f"{TRANSFORMER}.attention", "hidden_size", "num_attention_heads"),
    same(f"{TRANSFORMER}.attention.bias", "qkv_bias"),
    same(f"{TRANSFORMER}.mlp.mlp_width", "intermediate_size"),
    same(f"{TRANSFORMER}.mlp.activation", "hidden_act", ACTIVATIONS),
    same(f"{TRANSFORMER}.norm.eps", "layer_norm_eps"),
    same("vision.stem.patch_size", "patch_size"),
    tell("image_size", at("image.size")),
)


def table(config: ModelConfig) -> Table:
    """Names of the file and of the encoder."""
    width = config.vision.transformer.width
    attention = "encoder.layer.{i}.attention"
    names = Table(
        rules=(
            rename("embeddings.patch_embeddings.projection.*", "encoder.stem.*"),
            rename("embeddings.cls_token", "encoder.class_token"),
            on_grid(rename("embeddings.position_embeddings", "encoder.position"), extra=1),
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
        drops=(Drop("pooler.*", "a layer over the class token, for classifying"),),
    )
    return names.under("vit.").dropping(Drop("classifier.*", "the head of a classifier"))


FAMILIES = (
    Family(
        "vit",
        "encoder",
        by_model_type({"vit": ""}),
        FACTS,
        table,
        header={"architectures": ["ViTModel"], "model_type": "vit"},
        defaults=DEFAULTS,
        home="vit.",
    ),
)

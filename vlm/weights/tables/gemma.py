"""Gemma 1 and 2 (Gemma Team, 2024), as transformers publishes them.

Norms are stored as their distance from one, and so are ours. Gemma 2 normalises each branch's output too, caps
attention scores and logits, and looks through a window in every other layer.
"""

from __future__ import annotations

from typing import Any

from vlm.config import AttentionConfig, ModelConfig
from vlm.weights.facts import Fact, Settings, always, at, same, scale, tell, usual_scale
from vlm.weights.family import Family, by_model_type
from vlm.weights.rules import Drop, Table, Tied, concat, rename

TRANSFORMER = "decoder.transformer"
ATTENTION = f"{TRANSFORMER}.attention"

# Files from before the tanh form had a name say "gelu" and mean it.
ACTIVATION = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_tanh"}
DEFAULTS = {
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
}
DEFAULTS_1 = {
    **DEFAULTS,
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 24576,
}
DEFAULTS_2 = {
    **DEFAULTS,
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 9216,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}


def rope_base(settings: Settings) -> Any:
    """Base of the rotary angles, in the words of any version; scaled angles as they are spelled, for the message."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    return rope.get("rope_theta", settings.get("rope_theta", 10_000.0)) if kind == "default" else rope


FACTS = (
    always(f"{TRANSFORMER}.norm.kind", "rms"),
    always(f"{TRANSFORMER}.norm.offset", True),
    always(f"{TRANSFORMER}.position.kind", "rotary"),
    always(f"{TRANSFORMER}.mlp.kind", "gated"),
    always(f"{TRANSFORMER}.mlp.bias", False),
    always("decoder.scale_embeddings", True),
    same(f"{TRANSFORMER}.width", "hidden_size"),
    same(f"{TRANSFORMER}.depth", "num_hidden_layers"),
    same(f"{ATTENTION}.num_heads", "num_attention_heads"),
    same(f"{ATTENTION}.num_kv_heads", "num_key_value_heads"),
    same(f"{ATTENTION}.head_dim", "head_dim"),
    same(f"{ATTENTION}.bias", "attention_bias"),
    same(f"{TRANSFORMER}.mlp.mlp_width", "intermediate_size"),
    same(f"{TRANSFORMER}.norm.eps", "rms_norm_eps"),
    Fact(
        f"{TRANSFORMER}.position.base",
        "rope_parameters",
        at(f"{TRANSFORMER}.position.base"),
        rope_base,
        lambda base: {"rope_parameters": {"rope_theta": base, "rope_type": "default"}},
    ),
    same("decoder.tie_embeddings", "tie_word_embeddings"),
    tell("max_position_embeddings", at("decoder.context")),
)
FACTS_1 = (
    *FACTS,
    always(f"{TRANSFORMER}.sandwich", False),
    always(f"{ATTENTION}.windows", (None,)),
    always(f"{ATTENTION}.soft_cap", None),
    always("decoder.soft_cap", None),
    usual_scale(TRANSFORMER),
    same(f"{TRANSFORMER}.mlp.activation", "hidden_act", ACTIVATION),
)


def windows_of(config: ModelConfig) -> tuple[int | None, ...]:
    """The window of each layer."""
    transformer = config.decoder.transformer
    windows = transformer.attention.windows
    return tuple(windows[layer % len(windows)] for layer in range(transformer.depth))


def windows_in(settings: Settings) -> tuple[int | None, ...]:
    """The window of each layer: every other one, unless they are listed."""
    kinds = settings.get("layer_types") or [
        "full_attention" if layer % 2 else "sliding_attention" for layer in range(settings["num_hidden_layers"])
    ]
    return tuple(settings["sliding_window"] if kind == "sliding_attention" else None for kind in kinds)


def write_windows(windows: tuple[int | None, ...]) -> dict[str, Any]:
    """A model has windows of one width; where it has none, any width will do."""
    return {
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
        "sliding_window": next((window for window in windows if window is not None), 4096),
    }


def _scale(config: ModelConfig) -> float:
    return scale(config.decoder.transformer.attention)


FACTS_2 = (
    *FACTS,
    always(f"{TRANSFORMER}.sandwich", True),
    Fact(f"{ATTENTION}.windows", "sliding_window, layer_types", windows_of, windows_in, write_windows),
    same(f"{ATTENTION}.soft_cap", "attn_logit_softcapping"),
    same("decoder.soft_cap", "final_logit_softcapping"),
    Fact(
        f"{ATTENTION}.scale",
        "query_pre_attn_scalar",
        _scale,
        lambda settings: settings["query_pre_attn_scalar"] ** -0.5,
        lambda value: {"query_pre_attn_scalar": round(value**-2)},
    ),
    same(f"{TRANSFORMER}.mlp.activation", "hidden_activation", ACTIVATION),
)


def qkv_sizes(attention: AttentionConfig) -> tuple[int, int, int]:
    """Rows of queries, keys and values."""
    keys = attention.num_kv_heads * attention.head_dim
    return attention.num_heads * attention.head_dim, keys, keys


def table(config: ModelConfig) -> Table:
    """Names of the file and of the decoder; the norms after a branch are Gemma 2's."""
    transformer = config.decoder.transformer
    assert transformer.mlp.kind == "gated", "the facts were compared before"
    before_mlp = "pre_feedforward_layernorm" if transformer.sandwich else "post_attention_layernorm"
    return Table(
        rules=(
            rename("model.embed_tokens.weight", "decoder.tokens.weight"),
            rename("model.layers.{i}.input_layernorm.weight", "decoder.blocks.{i}.attention_norm.weight"),
            concat(
                [f"model.layers.{{i}}.self_attn.{part}_proj.*" for part in ("q", "k", "v")],
                "decoder.blocks.{i}.attention.qkv.*",
                qkv_sizes(transformer.attention),
            ),
            rename("model.layers.{i}.self_attn.o_proj.*", "decoder.blocks.{i}.attention.out.*"),
            rename("model.layers.{i}.post_attention_layernorm.weight", "decoder.blocks.{i}.attention_post_norm.weight"),
            rename(f"model.layers.{{i}}.{before_mlp}.weight", "decoder.blocks.{i}.mlp_norm.weight"),
            concat(
                ["model.layers.{i}.mlp.gate_proj.*", "model.layers.{i}.mlp.up_proj.*"],
                "decoder.blocks.{i}.mlp.gate_up.*",
                (transformer.mlp.mlp_width, transformer.mlp.mlp_width),
            ),
            rename("model.layers.{i}.mlp.down_proj.*", "decoder.blocks.{i}.mlp.out.*"),
            rename("model.layers.{i}.post_feedforward_layernorm.weight", "decoder.blocks.{i}.mlp_post_norm.weight"),
            rename("model.norm.weight", "decoder.norm.weight"),
            rename("lm_head.weight", "decoder.head.weight"),
        ),
        ties=(Tied("lm_head.weight", "model.embed_tokens.weight", "decoder.head.weight"),),
        drops=(Drop("model.*rotary_emb.inv_freq", "the frequencies of the rotary angles, a constant"),),
    )


FAMILIES = (
    Family(
        "gemma",
        "decoder",
        by_model_type({"gemma": ""}),
        FACTS_1,
        table,
        header={"architectures": ["GemmaForCausalLM"], "model_type": "gemma"},
        defaults=DEFAULTS_1,
        home="model.",
        text="",
    ),
    Family(
        "gemma2",
        "decoder",
        by_model_type({"gemma2": ""}),
        FACTS_2,
        table,
        header={"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"},
        defaults=DEFAULTS_2,
        home="model.",
        text="",
    ),
)

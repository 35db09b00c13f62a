"""Gemma 1 and 2 (Gemma Team, 2024) in transformers.

Gemma's files store each norm weight minus one. In our config, `norm.offset: true` stands for this format. Gemma 2 also
normalises the output of each branch, caps attention scores and logits, and uses sliding-window attention in every
second layer.
"""

from __future__ import annotations

from typing import Any

from vlm.config import AttentionConfig, ModelConfig
from vlm.weights.accounting import DECODER_WITHOUT_EFFECT
from vlm.weights.config_fields import (
    ACTIVATIONS,
    ConfigField,
    Settings,
    attention_biases,
    attention_scale,
    constant,
    default_attention_scale,
    default_options,
    required,
    same,
    sequential_pre_norm,
    value_at,
    write_only,
)
from vlm.weights.family import Family, transformers_family
from vlm.weights.rules import Drop, Tie, WeightTable, concat, rename
from vlm.weights.tensor_sizes import axis_size, has_tensor, num_layers, product, with_prefix

TRANSFORMER = "decoder.transformer"
ATTENTION = f"{TRANSFORMER}.attention"

# In old config files, `hidden_act: gelu` means the tanh form of GELU, because transformers then had no separate name
# for that form. The newer key `hidden_activation` always means the function that it names.
LEGACY_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_tanh"}
ACTIVATION_KEYS = {"hidden_act": LEGACY_ACTIVATIONS, "hidden_activation": ACTIVATIONS}
DEFAULTS = {
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": True,
}
WITHOUT_EFFECT = {
    **DECODER_WITHOUT_EFFECT,
    "max_position_embeddings": "is not needed by rotary positions; `decoder.context` limits the length",
}
DEFAULTS_1 = {
    **DEFAULTS,
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 24576,
}
DEFAULTS_2 = {
    **DEFAULTS,
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "intermediate_size": 9216,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}


def rope_base(settings: Settings) -> Any:
    """Return the base of the rotary angles.

    If the angles are scaled, return all settings of the angles. If several keys of config.json give different bases,
    return all of these bases. Settings or a list of bases never equal the base in our config, so the import fails.
    """
    bases = {settings.get("rope_theta")}
    for rope in (settings.get("rope_parameters") or {}, settings.get("rope_scaling") or {}):
        kinds = {rope.get("rope_type"), rope.get("type")} - {None, "default"}
        if kinds:
            return dict(rope)
        bases.add(rope.get("rope_theta"))
    found = sorted(base for base in bases if base is not None) or [10_000.0]
    return found[0] if len(found) == 1 else found


def other_activation(key: str, used: str) -> ConfigField:
    """Return a config field that compares our activation with the value of `key`. A config.json can have two keys for
    the activation; `used` is the key that counts if `key` is missing.
    """

    def theirs(settings: Settings) -> Any:
        read = key if settings.get(key) else used
        return ACTIVATION_KEYS[read].get(settings[read], settings[read])

    path = f"{TRANSFORMER}.mlp.activation"
    return ConfigField(path, key, value_at(path), theirs)


FIELDS = (
    constant(f"{TRANSFORMER}.norm.kind", "rms"),
    constant(f"{TRANSFORMER}.norm.offset", True),
    constant(f"{TRANSFORMER}.position.kind", "rotary"),
    constant(f"{TRANSFORMER}.mlp.kind", "gated"),
    constant(f"{TRANSFORMER}.mlp.bias", False),
    *sequential_pre_norm(TRANSFORMER),
    constant("decoder.scale_embeddings", True),
    same(f"{TRANSFORMER}.width", "hidden_size"),
    same(f"{TRANSFORMER}.depth", "num_hidden_layers"),
    same(f"{ATTENTION}.num_heads", "num_attention_heads"),
    same(f"{ATTENTION}.num_kv_heads", "num_key_value_heads"),
    same(f"{ATTENTION}.head_dim", "head_dim"),
    *attention_biases(ATTENTION, same(f"{ATTENTION}.bias", "attention_bias")),
    same(f"{TRANSFORMER}.mlp.mlp_width", "intermediate_size"),
    same(f"{TRANSFORMER}.norm.eps", "rms_norm_eps"),
    ConfigField(
        f"{TRANSFORMER}.position.base",
        "rope_parameters, rope_scaling, rope_theta, rope_type",
        value_at(f"{TRANSFORMER}.position.base"),
        rope_base,
        lambda base: {"rope_parameters": {"rope_theta": base, "rope_type": "default"}},
    ),
    same("decoder.tie_embeddings", "tie_word_embeddings"),
    write_only("max_position_embeddings", value_at("decoder.context")),
    *default_options(),
)
CAUSAL = required("use_bidirectional_attention", False)
FIELDS_1 = (
    *FIELDS,
    constant(f"{TRANSFORMER}.sandwich", False),
    constant(f"{ATTENTION}.windows", (None,)),
    constant(f"{ATTENTION}.soft_cap", None),
    constant("decoder.soft_cap", None),
    default_attention_scale(TRANSFORMER),
    same(f"{TRANSFORMER}.mlp.activation", "hidden_act", LEGACY_ACTIVATIONS),
    other_activation("hidden_activation", "hidden_act"),
)


def windows_of(config: ModelConfig) -> tuple[int | None, ...]:
    """Return the attention window of each layer of our model."""
    transformer = config.decoder.transformer
    windows = transformer.attention.windows
    return tuple(windows[layer % len(windows)] for layer in range(transformer.depth))


def windows_in(settings: Settings) -> tuple[Any, ...]:
    """Return the attention window of each layer in config.json. By default, only even-numbered layers use windowed
    attention.
    """
    kinds = settings.get("layer_types") or [
        "full_attention" if layer % 2 else "sliding_attention" for layer in range(settings["num_hidden_layers"])
    ]
    window = settings["sliding_window"]
    # Without a window size, transformers cannot compute a layer with sliding attention. The layer type then replaces
    # the window size in the result, so that the import fails.
    sizes = {"full_attention": None, "sliding_attention": "sliding_attention" if window is None else window}
    return tuple(sizes.get(kind, kind) for kind in kinds)


def write_windows(windows: tuple[int | None, ...]) -> dict[str, Any]:
    """Return the settings of the attention windows for config.json. Even if no layer has a window, config.json needs a
    window size.
    """
    return {
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
        "sliding_window": next((window for window in windows if window is not None), 4096),
    }


def _scale(config: ModelConfig) -> float:
    return attention_scale(config.decoder.transformer.attention)


FIELDS_2 = (
    *FIELDS,
    constant(f"{TRANSFORMER}.sandwich", True),
    ConfigField(f"{ATTENTION}.windows", "sliding_window, layer_types", windows_of, windows_in, write_windows),
    same(f"{ATTENTION}.soft_cap", "attn_logit_softcapping"),
    same("decoder.soft_cap", "final_logit_softcapping"),
    ConfigField(
        f"{ATTENTION}.scale",
        "query_pre_attn_scalar",
        _scale,
        lambda settings: settings["query_pre_attn_scalar"] ** -0.5,
        lambda value: {"query_pre_attn_scalar": round(value**-2)},
    ),
    same(f"{TRANSFORMER}.mlp.activation", "hidden_activation", ACTIVATIONS),
    other_activation("hidden_act", "hidden_activation"),
)


def qkv_sizes(attention: AttentionConfig) -> tuple[int, int, int]:
    """Return the numbers of rows that queries, keys and values have in the joint projection weight."""
    keys = attention.num_kv_heads * attention.head_dim
    return attention.num_heads * attention.head_dim, keys, keys


SIZES = with_prefix(
    (
        axis_size("vocab_size", "embed_tokens.weight", 0),
        axis_size("hidden_size", "embed_tokens.weight", 1),
        num_layers("num_hidden_layers", "layers.{i}.input_layernorm.weight"),
        axis_size("intermediate_size", "layers.0.mlp.gate_proj.weight", 0),
        product("num_attention_heads", "head_dim", "layers.0.self_attn.q_proj.weight"),
        product("num_key_value_heads", "head_dim", "layers.0.self_attn.k_proj.weight"),
        has_tensor("attention_bias", "layers.0.self_attn.q_proj.bias"),
    ),
    "model.",
)


def table(config: ModelConfig) -> WeightTable:
    """Return the weight table of the decoder. Only Gemma 2 has norms after a branch."""
    transformer = config.decoder.transformer
    assert transformer.mlp.kind == "gated", "config fields are compared before a table is built"
    before_mlp = "pre_feedforward_layernorm" if transformer.sandwich else "post_attention_layernorm"
    return WeightTable(
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
        ties=(Tie("lm_head.weight", "model.embed_tokens.weight", "decoder.head.weight"),),
        drops=(Drop("model.*rotary_emb.inv_freq", "constant frequencies of the rotary angles"),),
    )


def _version(name: str, architecture: str, fields: tuple[ConfigField, ...], defaults: Settings) -> Family:
    return transformers_family(
        name,
        "decoder",
        architecture=architecture,
        sections={name: ""},
        fields=(*fields, CAUSAL),
        table=table,
        defaults=defaults,
        without_effect=WITHOUT_EFFECT,
        sizes=SIZES,
        prefix="model.",
        vocab_section="",
    )


FAMILIES = (
    _version("gemma", "GemmaForCausalLM", FIELDS_1, DEFAULTS_1),
    _version("gemma2", "Gemma2ForCausalLM", FIELDS_2, DEFAULTS_2),
)

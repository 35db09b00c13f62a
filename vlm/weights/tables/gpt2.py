"""GPT-2 (Radford et al., 2019) in transformers. GPT-2 stores the weights of linear layers as (inputs, outputs)."""

from __future__ import annotations

from typing import Any

from vlm.config import ModelConfig
from vlm.weights.accounting import DECODER_WITHOUT_EFFECT
from vlm.weights.config_fields import (
    ACTIVATIONS,
    ConfigField,
    Settings,
    attention_biases,
    attention_heads,
    constant,
    default_options,
    required,
    same,
    standard_transformer,
    value_at,
)
from vlm.weights.family import transformers_family
from vlm.weights.rules import Drop, Tie, WeightTable, rename, transpose
from vlm.weights.tensor_sizes import axis_size, num_layers, with_prefix

TRANSFORMER = "decoder.transformer"
DEFAULTS = {
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}


def mlp_width(settings: Settings) -> Any:
    """Return the width of the MLP, which is four times the model's width if `n_inner` is null."""
    return settings["n_inner"] or 4 * settings["n_embd"]


FIELDS = (
    *standard_transformer(TRANSFORMER),
    *attention_biases(f"{TRANSFORMER}.attention", constant(f"{TRANSFORMER}.attention.bias", True)),
    constant("decoder.scale_embeddings", False),
    constant("decoder.soft_cap", None),
    same(f"{TRANSFORMER}.width", "n_embd"),
    same(f"{TRANSFORMER}.depth", "n_layer"),
    *attention_heads(f"{TRANSFORMER}.attention", "n_embd", "n_head"),
    ConfigField(
        f"{TRANSFORMER}.mlp.mlp_width",
        "n_inner",
        value_at(f"{TRANSFORMER}.mlp.mlp_width"),
        mlp_width,
        lambda value: {"n_inner": value},
    ),
    same(f"{TRANSFORMER}.mlp.activation", "activation_function", {"gelu_new": "gelu_tanh", **ACTIVATIONS}),
    same(f"{TRANSFORMER}.norm.eps", "layer_norm_epsilon"),
    same("decoder.context", "n_positions"),
    same("decoder.tie_embeddings", "tie_word_embeddings"),
    required("scale_attn_weights", True),
    required("scale_attn_by_inverse_layer_idx", False),
    *default_options(),
)
WITHOUT_EFFECT = {
    **DECODER_WITHOUT_EFFECT,
    "summary_*": "belongs to a classifier, which is not imported",
    "n_ctx": "is not used by transformers, which reads n_positions",
}

SIZES = with_prefix(
    (
        axis_size("vocab_size", "wte.weight", 0),
        axis_size("n_embd", "wte.weight", 1),
        axis_size("n_positions", "wpe.weight", 0),
        num_layers("n_layer", "h.{i}.ln_1.weight"),
        axis_size("n_inner", "h.0.mlp.c_fc.weight", 1, mlp_width),
    ),
    "transformer.",
)


def table(_: ModelConfig) -> WeightTable:
    """Return the weight table of the decoder."""
    return WeightTable(
        rules=(
            rename("transformer.wte.weight", "decoder.tokens.weight"),
            rename("transformer.wpe.weight", "decoder.position.weight"),
            rename("transformer.h.{i}.ln_1.*", "decoder.blocks.{i}.attention_norm.*"),
            transpose("transformer.h.{i}.attn.c_attn.*", "decoder.blocks.{i}.attention.qkv.*"),
            transpose("transformer.h.{i}.attn.c_proj.*", "decoder.blocks.{i}.attention.out.*"),
            rename("transformer.h.{i}.ln_2.*", "decoder.blocks.{i}.mlp_norm.*"),
            transpose("transformer.h.{i}.mlp.c_fc.*", "decoder.blocks.{i}.mlp.up.*"),
            transpose("transformer.h.{i}.mlp.c_proj.*", "decoder.blocks.{i}.mlp.out.*"),
            rename("transformer.ln_f.*", "decoder.norm.*"),
            rename("lm_head.weight", "decoder.head.weight"),
        ),
        ties=(Tie("lm_head.weight", "transformer.wte.weight", "decoder.head.weight"),),
        drops=(
            Drop("transformer.h.*.attn.bias", "the constant causal mask"),
            Drop("transformer.h.*.attn.masked_bias", "the constant fill value of the causal mask"),
        ),
    )


FAMILIES = (
    transformers_family(
        "gpt2",
        "decoder",
        architecture="GPT2LMHeadModel",
        sections={"gpt2": ""},
        fields=FIELDS,
        table=table,
        defaults=DEFAULTS,
        without_effect=WITHOUT_EFFECT,
        prefix="transformer.",
        sizes=SIZES,
        vocab_section="",
    ),
)

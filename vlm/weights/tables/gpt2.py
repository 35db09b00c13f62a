"""GPT-2 (Radford et al., 2019), as transformers publishes it. Its linear layers are stored (in, out)."""

from __future__ import annotations

from vlm.config import ModelConfig
from vlm.weights.facts import ACTIVATIONS, Fact, always, at, classic, heads, only, same
from vlm.weights.family import Family, by_model_type
from vlm.weights.rules import Drop, Table, Tied, rename, transpose

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
FACTS = (
    *classic(TRANSFORMER),
    always(f"{TRANSFORMER}.attention.bias", True),
    always("decoder.scale_embeddings", False),
    always("decoder.soft_cap", None),
    same(f"{TRANSFORMER}.width", "n_embd"),
    same(f"{TRANSFORMER}.depth", "n_layer"),
    *heads(f"{TRANSFORMER}.attention", "n_embd", "n_head"),
    Fact(
        f"{TRANSFORMER}.mlp.mlp_width",
        "n_inner",
        at(f"{TRANSFORMER}.mlp.mlp_width"),
        lambda settings: settings["n_inner"] or 4 * settings["n_embd"],
        lambda value: {"n_inner": value},
    ),
    same(f"{TRANSFORMER}.mlp.activation", "activation_function", {"gelu_new": "gelu_tanh", **ACTIVATIONS}),
    same(f"{TRANSFORMER}.norm.eps", "layer_norm_epsilon"),
    same("decoder.context", "n_positions"),
    same("decoder.tie_embeddings", "tie_word_embeddings"),
    only("scale_attn_weights", True),
    only("scale_attn_by_inverse_layer_idx", False),
    only("add_cross_attention", False),
)


def table(_: ModelConfig) -> Table:
    """Names of the file and of the decoder."""
    return Table(
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
        ties=(Tied("lm_head.weight", "transformer.wte.weight", "decoder.head.weight"),),
        drops=(
            Drop("transformer.h.*.attn.bias", "the causal mask, a constant"),
            Drop("transformer.h.*.attn.masked_bias", "what the causal mask fills in, a constant"),
        ),
    )


FAMILIES = (
    Family(
        "gpt2",
        "decoder",
        by_model_type({"gpt2": ""}),
        FACTS,
        table,
        header={"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
        defaults=DEFAULTS,
        home="transformer.",
        text="",
    ),
)

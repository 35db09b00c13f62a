"""Conversion of transformers' weights to our names, written by hand without the tables in `vlm.weights`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def gpt2(theirs: State, depth: int) -> dict[str, Tensor]:
    """Convert the decoder from GPT2LMHeadModel, which stores the weight of a linear layer with shape (in, out)."""
    ours = {
        "tokens.weight": theirs["transformer.wte.weight"],
        "head.weight": theirs["transformer.wte.weight"],
        "position.weight": theirs["transformer.wpe.weight"],
    }
    for kind in ("weight", "bias"):
        ours[f"norm.{kind}"] = theirs[f"transformer.ln_f.{kind}"]
        for i in range(depth):
            for name, other in (
                ("attention_norm", "ln_1"),
                ("mlp_norm", "ln_2"),
                ("attention.qkv", "attn.c_attn"),
                ("attention.out", "attn.c_proj"),
                ("mlp.up", "mlp.c_fc"),
                ("mlp.out", "mlp.c_proj"),
            ):
                tensor = theirs[f"transformer.h.{i}.{other}.{kind}"]
                ours[f"blocks.{i}.{name}.{kind}"] = tensor.T if tensor.ndim == 2 else tensor
    return ours


def gemma(theirs: State, depth: int, *, prefix: str, sandwich: bool) -> dict[str, Tensor]:
    """Convert the decoder from GemmaForCausalLM, Gemma2ForCausalLM, or the language model of PaliGemma."""
    ours = dict.fromkeys(("tokens.weight", "head.weight"), theirs[f"{prefix}embed_tokens.weight"])
    ours["norm.weight"] = theirs[f"{prefix}norm.weight"]
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if sandwich:
        norms = {
            "attention_norm": "input_layernorm",
            "attention_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
    for i in range(depth):
        layer, block = f"{prefix}layers.{i}", f"blocks.{i}"
        for name, other in norms.items():
            ours[f"{block}.{name}.weight"] = theirs[f"{layer}.{other}.weight"]
        qkv = [theirs[f"{layer}.self_attn.{part}_proj.weight"] for part in "qkv"]
        ours[f"{block}.attention.qkv.weight"] = torch.cat(qkv)
        ours[f"{block}.attention.out.weight"] = theirs[f"{layer}.self_attn.o_proj.weight"]
        gate_up = [theirs[f"{layer}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
        ours[f"{block}.mlp.gate_up.weight"] = torch.cat(gate_up)
        ours[f"{block}.mlp.out.weight"] = theirs[f"{layer}.mlp.down_proj.weight"]
    return ours


def siglip(theirs: State, depth: int, *, prefix: str) -> dict[str, Tensor]:
    """Convert the encoder from SigLIP's vision tower without its pooling head."""
    ours = {"position": theirs[f"{prefix}embeddings.position_embedding.weight"][None]}
    for kind in ("weight", "bias"):
        ours[f"stem.{kind}"] = theirs[f"{prefix}embeddings.patch_embedding.{kind}"]
        ours[f"norm.{kind}"] = theirs[f"{prefix}post_layernorm.{kind}"]
        for i in range(depth):
            layer, block = f"{prefix}encoder.layers.{i}", f"blocks.{i}"
            qkv = [theirs[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            ours[f"{block}.attention.qkv.{kind}"] = torch.cat(qkv)
            for name, other in (
                ("attention_norm", "layer_norm1"),
                ("mlp_norm", "layer_norm2"),
                ("attention.out", "self_attn.out_proj"),
                ("mlp.up", "mlp.fc1"),
                ("mlp.out", "mlp.fc2"),
            ):
                ours[f"{block}.{name}.{kind}"] = theirs[f"{layer}.{other}.{kind}"]
    return ours


def paligemma(theirs: State, encoder_depth: int, decoder_depth: int) -> dict[str, Tensor]:
    """Convert the whole model from PaliGemmaForConditionalGeneration."""
    parts = {
        "encoder": siglip(theirs, encoder_depth, prefix="model.vision_tower."),
        "projector": {k: theirs[f"model.multi_modal_projector.linear.{k}"] for k in ("weight", "bias")},
        "decoder": gemma(theirs, decoder_depth, prefix="model.language_model.", sandwich=False),
    }
    return {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}


def timm_vit(theirs: State, depth: int) -> dict[str, Tensor]:
    """Convert the encoder from a timm VisionTransformer with registers and layer scale, without its final norm."""
    ours = {"position": theirs["pos_embed"], "registers": theirs["reg_token"]}
    for i in range(depth):
        ours[f"blocks.{i}.attention_scale"] = theirs[f"blocks.{i}.ls1.gamma"]
        ours[f"blocks.{i}.mlp_scale"] = theirs[f"blocks.{i}.ls2.gamma"]
    for kind in ("weight", "bias"):
        ours[f"stem.{kind}"] = theirs[f"patch_embed.proj.{kind}"]
        for i in range(depth):
            for name, other in (
                ("attention_norm", "norm1"),
                ("mlp_norm", "norm2"),
                ("attention.qkv", "attn.qkv"),
                ("attention.out", "attn.proj"),
                ("mlp.up", "mlp.fc1"),
                ("mlp.out", "mlp.fc2"),
            ):
                ours[f"blocks.{i}.{name}.{kind}"] = theirs[f"blocks.{i}.{other}.{kind}"]
    return ours

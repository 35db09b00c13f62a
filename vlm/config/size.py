"""How large a model is and how much it computes, from its config alone: nothing is built, torch is not needed.

FLOPs count two a multiply-add of every matrix product, attention's two included, of one forward pass over one sample:
one picture and a full text of `generation.max_new_tokens`. A training step is three times that.
"""

from __future__ import annotations

import itertools

from vlm.config import AttentionConfig, MlpConfig, ModelConfig, ResamplerProjectorConfig, TransformerConfig


def flops_per_sample(config: ModelConfig, vocab_size: int, text: int | None = None) -> int:
    """FLOPs of the forward pass over one picture and a text of so many tokens: the longest answer, where none is given.

    The head works at the text's positions alone.
    """
    text = config.generation.max_new_tokens if text is None else text
    return _encoder(config) + _projector(config) + _decoder(config, vocab_size, text)


PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L4": 121e12,
}
"""Dense bf16 FLOPs a second of GPUs, by a part of their name, the longer name first (NVIDIA's data sheets)."""


def peak_of(gpu: str) -> float | None:
    """Dense bf16 FLOPs a second of a GPU, by the name that CUDA gives it; None where it is not known."""
    return next((peak for name, peak in PEAKS.items() if name in gpu), None)


def idle_parameters(config: ModelConfig) -> int:
    """Parameters that a token does not meet: those of the experts it is not sent to."""
    return sum(
        stack.depth * (stack.mlp.num_experts - stack.mlp.top_k) * _mlp_parameters(stack.width, stack.mlp.expert)
        for stack in (config.vision.transformer, config.decoder.transformer)
        if stack.mlp.kind == "moe"
    )


def _encoder(config: ModelConfig) -> int:
    vision = config.vision
    tokens = config.num_patches + vision.class_token + vision.registers
    width = vision.transformer.width
    if vision.stem.kind == "patch":
        stem = 2 * config.num_patches * 3 * vision.stem.patch_size**2 * width
    else:
        channels, side, stem = (3, *vision.stem.channels), config.image.size, 0
        for before, after in itertools.pairwise(channels):
            side //= 2
            stem += 2 * side**2 * 9 * before * after
        stem += 2 * side**2 * channels[-1] * width
    pool = 0
    if vision.select == "attention":
        heads = vision.transformer.attention.num_heads * vision.transformer.attention.head_dim
        pool = 2 * (2 * width * heads + tokens * 2 * width * heads) + 4 * tokens * heads
        pool += 2 * _mlp_weights(width, vision.transformer.mlp)
    return stem + _stack(vision.transformer, tokens) + pool


def _projector(config: ModelConfig) -> int:
    projector, width = config.projector, config.vision.transformer.width
    out_width = config.decoder.transformer.width
    given = config.num_patches if config.vision.select == "patches" else 1
    match projector.kind:
        case "linear":
            return 2 * given * width * out_width
        case "mlp":
            return 2 * given * projector.mlp_width * (width + out_width)
        case "pixel_shuffle":
            return 2 * config.num_features * projector.factor**2 * width * out_width
        case "resampler":
            return _resampler(projector, given, width) + 2 * projector.num_latents * width * out_width


def _resampler(config: ResamplerProjectorConfig, given: int, width: int) -> int:
    latents, heads = config.num_latents, config.num_heads * config.head_dim
    seen = given + latents
    linear = latents * 2 * width * heads + seen * 2 * width * heads + latents * _mlp_weights(width, config.mlp)
    return config.depth * (2 * linear + 4 * latents * seen * heads)


def _decoder(config: ModelConfig, vocab_size: int, text: int) -> int:
    transformer, fusion = config.decoder.transformer, config.fusion
    tokens = config.num_slots + text
    flops = _stack(transformer, tokens) + 2 * text * transformer.width * vocab_size
    if fusion.kind == "cross_attention":
        heads, memory = fusion.num_heads * fusion.head_dim, config.num_features
        linear = tokens * (2 * transformer.width * heads + _mlp_weights(transformer.width, fusion.mlp))
        linear += memory * 2 * transformer.width * heads
        flops += (transformer.depth // fusion.every) * (2 * linear + 4 * tokens * memory * heads)
    return flops


def _stack(config: TransformerConfig, tokens: int) -> int:
    """Blocks over `tokens` positions; attention counted in full, as a kernel without a causal shortcut computes it."""
    weights = _attention_weights(config.width, config.attention) + _mlp_weights(config.width, config.mlp)
    attention = 4 * tokens**2 * config.attention.num_heads * config.attention.head_dim
    return config.depth * (2 * tokens * weights + attention)


def _attention_weights(width: int, config: AttentionConfig) -> int:
    return width * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)


def _mlp_weights(width: int, config: MlpConfig) -> int:
    """Weights a token is multiplied with."""
    match config.kind:
        case "plain":
            return 2 * width * config.mlp_width
        case "gated":
            return 3 * width * config.mlp_width
        case "moe":
            return width * config.num_experts + config.top_k * _mlp_weights(width, config.expert)


def _mlp_parameters(width: int, config: MlpConfig) -> int:
    """Weights and biases of one MLP."""
    assert config.kind != "moe", "experts are not mixtures themselves"
    hidden = config.mlp_width * (2 if config.kind == "gated" else 1)
    return _mlp_weights(width, config) + config.bias * (hidden + width)

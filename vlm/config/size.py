"""Functions that compute FLOPs and parameter counts from a model's config, without building the model.

The functions count the FLOPs of one forward pass over one sample, which is one picture and a text. One multiplication
with one addition counts as two FLOPs. The functions count only matrix products, including the two matrix products of
attention. A training step takes about three times the FLOPs of a forward pass.
"""

from __future__ import annotations

import itertools

from vlm.config import AttentionConfig, MlpConfig, ModelConfig, ResamplerProjectorConfig, TransformerConfig


def flops_per_sample(config: ModelConfig, vocab_size: int, text: int | None = None) -> int:
    """Return the FLOPs of one forward pass over one picture and a text. The output head runs on text positions only.

    A text-only model (`text_only`) reads no picture.

    Args:
        config: config of the model.
        vocab_size: number of rows of the token embedding table.
        text: length of the text in tokens, or None for `generation.max_new_tokens`.
    """
    text = config.generation.max_new_tokens if text is None else text
    pictures = 0 if config.text_only else _encoder(config) + _projector(config)
    return pictures + _decoder(config, vocab_size, text)


PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L4": 121e12,
}
"""Dict from a part of a GPU's name to the GPU's peak FLOPs per second in dense bf16 (NVIDIA's data sheets).

The function `peak_flops` uses the first key that occurs in the GPU's name, so the key "H100 PCIe" precedes "H100", and
"L40" precedes "L4".
"""


def peak_flops(gpu: str) -> float | None:
    """Return the peak dense bf16 FLOPs per second for a CUDA device name, or None if no key of `PEAK_FLOPS` occurs in
    the name.
    """
    return next((peak for name, peak in PEAK_FLOPS.items() if name in gpu), None)


def inactive_parameters(config: ModelConfig) -> int:
    """Return the number of parameters in the experts that the router does not choose for a token."""
    return sum(
        stack.depth * (stack.mlp.num_experts - stack.mlp.top_k) * _mlp_parameters(stack.width, stack.mlp.expert)
        for stack in (() if config.text_only else (config.vision.transformer,)) + (config.decoder.transformer,)
        if stack.mlp.kind == "moe"
    )


def num_attention_weights(config: ModelConfig, text: int) -> int:
    """Return the number of attention weights in the blocks of encoder and decoder, for one picture and a text.

    Args:
        config: config of a model with an encoder.
        text: length of the text in tokens.
    """
    encoder, decoder = config.vision.transformer, config.decoder.transformer
    patches = config.num_patches + config.vision.class_token + config.vision.registers
    stacks = ((encoder, patches), (decoder, config.num_slots + text))
    return sum(stack.depth * stack.attention.num_heads * tokens**2 for stack, tokens in stacks)


def _encoder(config: ModelConfig) -> int:
    vision = config.vision
    tokens = config.num_patches + vision.class_token + vision.registers
    width = vision.transformer.width
    if vision.stem.kind == "patch":
        stem = 2 * config.num_patches * 3 * vision.stem.patch_size**2 * width
    else:
        channels, side, stem = (3, *vision.stem.channels), config.image.size, 0
        blocks = vision.stem.blocks or (0,) * len(vision.stem.channels)
        for (before, after), count in zip(itertools.pairwise(channels), blocks, strict=True):
            side //= 2
            stem += 2 * side**2 * 9 * (before + 2 * count * after) * after
        stem += 2 * side**2 * channels[-1] * width
    pool = 0
    if vision.select == "attention":
        heads = vision.transformer.attention.num_heads * vision.transformer.attention.head_dim
        pool = 2 * (2 * width * heads + config.num_patches * 2 * width * heads) + 4 * config.num_patches * heads
        pool += 2 * _mlp_weights(width, vision.transformer.mlp)
    return stem + _stack(vision.transformer, tokens) + pool + _relative_positions(config)


def _relative_positions(config: ModelConfig) -> int:
    """Return the FLOPs of the MLPs that compute a bias for each distance between two patches. The batch has one
    picture.
    """
    transformer = config.vision.transformer
    if transformer.position.kind != "relative":
        return 0
    distances = (2 * (config.image.size // config.vision.stem.stride) - 1) ** 2
    weights = transformer.position.mlp_width * (2 + transformer.attention.num_heads)
    return 2 * distances * weights * (1 if transformer.position.shared else transformer.depth)


def _projector(config: ModelConfig) -> int:
    projector, width = config.projector, config.vision.transformer.width
    out_width = config.decoder.transformer.width
    inputs = config.num_patches if config.vision.select == "patches" else 1
    match projector.kind:
        case "linear":
            return 2 * inputs * width * out_width
        case "mlp":
            return 2 * inputs * projector.mlp_width * (width + out_width)
        case "pixel_shuffle":
            return 2 * config.num_features * projector.factor**2 * width * out_width
        case "resampler":
            return _resampler(projector, inputs, width) + 2 * projector.num_latents * width * out_width


def _resampler(config: ResamplerProjectorConfig, inputs: int, width: int) -> int:
    latents, heads = config.num_latents, config.num_heads * config.head_dim
    keys = inputs + latents
    linear = latents * 2 * width * heads + keys * 2 * width * heads + latents * _mlp_weights(width, config.mlp)
    return config.depth * (2 * linear + 4 * latents * keys * heads)


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
    """Return the FLOPs of all blocks over `tokens` positions.

    The FLOPs of attention include all pairs of positions, even with a causal mask.
    """
    weights = _attention_weights(config.width, config.attention) + _mlp_weights(config.width, config.mlp)
    attention = 4 * tokens**2 * config.attention.num_heads * config.attention.head_dim
    return config.depth * (2 * tokens * weights + attention)


def _attention_weights(width: int, config: AttentionConfig) -> int:
    return width * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)


def _mlp_weights(width: int, config: MlpConfig) -> int:
    """Return the number of weights in the matrix products that an MLP computes for one token."""
    match config.kind:
        case "plain":
            return 2 * width * config.mlp_width
        case "gated":
            return 3 * width * config.mlp_width
        case "moe":
            return width * config.num_experts + config.top_k * _mlp_weights(width, config.expert)


def _mlp_parameters(width: int, config: MlpConfig) -> int:
    """Return the number of weights and biases of one MLP."""
    assert config.kind != "moe", "an expert is never a mixture of experts"
    hidden = config.mlp_width * (2 if config.kind == "gated" else 1)
    return _mlp_weights(width, config) + config.bias * (hidden + width)

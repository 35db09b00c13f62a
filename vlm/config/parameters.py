"""Numbers of parameters of a model, computed from its config without building the model and without torch."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from vlm.config.model import ModelConfig
from vlm.config.transformer import MlpConfig, NormConfig, TransformerConfig, adds_position_vectors
from vlm.config.vision import ProjectorConfig, ResamplerProjectorConfig, StemConfig


class ParameterCounts(NamedTuple):
    """Numbers of parameters of the parts of a model. An embedding table that is also the output head counts once."""

    encoder: int
    projector: int
    fusion: int
    decoder: int


def count_parameters(config: ModelConfig, vocab_size: int) -> ParameterCounts:
    """Count the parameters of each part of a model with `vocab_size` tokens. A text-only model has only a decoder."""
    width, out_width = config.vision.transformer.width, config.decoder.transformer.width
    if config.text_only:
        return ParameterCounts(0, 0, 0, _decoder(config, vocab_size))
    return ParameterCounts(
        _encoder(config),
        _projector(config.projector, width, out_width),
        out_width if config.fusion.kind == "cross_attention" else 0,
        _decoder(config, vocab_size),
    )


def _encoder(config: ModelConfig) -> int:
    vision, transformer = config.vision, config.vision.transformer
    width, extra = transformer.width, vision.class_token + vision.registers
    learned = adds_position_vectors(transformer.position)
    rows = config.num_patches + (extra if vision.position_on == "all" else 0)
    count = _stem(vision.stem, width) + _stack(transformer) + (extra + rows * learned) * width
    count += _positions(transformer)
    count += (vision.pre_norm + vision.post_norm) * _norm(transformer.norm, width)
    if vision.select == "attention":
        heads = transformer.attention
        count += width + _cross_attention(width, heads.num_heads * heads.head_dim, bias=heads.bias)
        count += _norm(transformer.norm, width) + _mlp(transformer.mlp, width)
    return count


def _positions(config: TransformerConfig) -> int:
    """Return the number of parameters of mixed or relative position encodings in all blocks."""
    heads = config.attention.num_heads
    match config.position.kind:
        case "mixed":
            return config.depth * heads * config.attention.head_dim
        case "relative":
            hidden = config.position.mlp_width
            mlp = _linear(2, hidden, bias=True) + _linear(hidden, heads, bias=True)
            return mlp if config.position.shared else config.depth * mlp
        case _:
            return 0


def _stem(config: StemConfig, width: int) -> int:
    if config.kind == "patch":
        return _linear(3 * config.patch_size**2, width, bias=config.bias)
    count, blocks = 0, config.blocks or (0,) * len(config.channels)
    for (before, after), number in zip(itertools.pairwise((3, *config.channels)), blocks, strict=True):
        count += 9 * before * after + 2 * after + number * 2 * (9 * after**2 + 2 * after)
    return count + _linear(config.channels[-1], width, bias=True)


def _projector(config: ProjectorConfig, width: int, out_width: int) -> int:
    match config.kind:
        case "linear":
            return _linear(width, out_width, bias=True)
        case "mlp":
            return _linear(width, config.mlp_width, bias=True) + _linear(config.mlp_width, out_width, bias=True)
        case "pixel_shuffle":
            return _linear(width * config.factor**2, out_width, bias=False)
        case "resampler":
            return _resampler(config, width) + _linear(width, out_width, bias=True)


def _resampler(config: ResamplerProjectorConfig, width: int) -> int:
    layer_norm = 2 * width
    block = _cross_attention(width, config.num_heads * config.head_dim, bias=False) + 3 * layer_norm
    block += _mlp(config.mlp, width)
    return config.num_latents * width + config.depth * block + layer_norm


def _decoder(config: ModelConfig, vocab_size: int) -> int:
    decoder, transformer, fusion = config.decoder, config.decoder.transformer, config.fusion
    width = transformer.width
    count = vocab_size * width * (1 if decoder.tie_embeddings else 2)
    count += _stack(transformer) + _norm(transformer.norm, width)
    if transformer.position.kind == "learned":
        count += decoder.context * width
    if fusion.kind == "cross_attention":
        block = _cross_attention(width, fusion.num_heads * fusion.head_dim, bias=False)
        block += _mlp(fusion.mlp, width) + 2 * _norm(transformer.norm, width) + 2  # the two gates
        count += (transformer.depth // fusion.every) * block
    return count


def _stack(config: TransformerConfig) -> int:
    width, attention = config.width, config.attention
    heads = (attention.num_heads + 2 * attention.num_kv_heads) * attention.head_dim
    block = _linear(width, heads, bias=attention.bias)
    block += _linear(attention.num_heads * attention.head_dim, width, bias=attention.has_out_bias)
    norms = (1 if config.parallel else 2) * config.input_norms + 2 * config.sandwich
    block += _mlp(config.mlp, width) + norms * _norm(config.norm, width)
    if attention.qk_norm:
        block += 2 * _norm(config.norm, attention.head_dim)
    if config.layer_scale:
        block += 2 * width
    return config.depth * block


def _mlp(config: MlpConfig, width: int) -> int:
    match config.kind:
        case "plain":
            up = _linear(width, config.mlp_width, bias=config.bias)
        case "gated":
            up = _linear(width, 2 * config.mlp_width, bias=config.bias)
        case "moe":
            routers = (2 if config.noisy else 1) * width * config.num_experts
            return routers + config.num_experts * _mlp(config.expert, width)
    return up + _linear(config.mlp_width, width, bias=config.bias)


def _cross_attention(width: int, heads: int, *, bias: bool) -> int:
    return _linear(width, 3 * heads, bias=bias) + _linear(heads, width, bias=bias)


def _norm(config: NormConfig, width: int) -> int:
    return width * (2 if config.kind == "layer" else 1)


def _linear(inputs: int, outputs: int, *, bias: bool) -> int:
    return outputs * (inputs + bias)

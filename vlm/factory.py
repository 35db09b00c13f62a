"""Construction of a model from its config. No other module chooses model classes by the field `kind` of a config."""

from __future__ import annotations

import functools
import math

import torch
from torch import nn
from torch.nn import functional as F

from vlm.config import (
    Activation,
    CrossFusionConfig,
    MlpConfig,
    ModelConfig,
    MoeMlpConfig,
    NormConfig,
    ProjectorConfig,
    ResamplerProjectorConfig,
    StemConfig,
    TransformerConfig,
    VisionConfig,
    adds_position_vectors,
)
from vlm.decoder import Decoder
from vlm.fusion import CrossFusion, GatedCrossBlock, SlotsFusion
from vlm.layers.attention import Attention, CrossAttention
from vlm.layers.block import Block
from vlm.layers.meta import Fp32
from vlm.layers.mlp import ActivationFunction, GatedMlp, PlainMlp
from vlm.layers.moe import GatedExperts, GroupedLinear, MoeMlp, PlainExperts
from vlm.layers.norm import OffsetRmsNorm
from vlm.layers.position import AxialRotary, MixedRotary, RelativeBias, Rotary
from vlm.model import VisionLanguageModel
from vlm.projector import PixelShuffle, Resampler, ResamplerBlock
from vlm.vision import AttentionPool, ConvStem, NoEncoder, PatchStem, VisionEncoder


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[Activation, ActivationFunction] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
}


def build_model(config: ModelConfig, vocab_size: int) -> VisionLanguageModel:
    """Build a model with random weights from torch's global random generator, which the caller must seed first."""
    model = construct_model(config, vocab_size)
    initialize_weights(model)
    return model


def construct_model(config: ModelConfig, vocab_size: int) -> VisionLanguageModel:
    """Construct the modules of a model. The caller must then load weights, or call `initialize_weights`.

    Weights and rotary tables are fp32, whatever the default type of the process is. As for the layers of torch, the
    context manager `torch.device` decides the device. In `with torch.device("meta")`, the model takes no memory.
    """
    with Fp32():
        return _construct_model(config, vocab_size)


def _construct_model(config: ModelConfig, vocab_size: int) -> VisionLanguageModel:
    return VisionLanguageModel(
        config,
        NoEncoder() if config.text_only else _encoder(config),
        nn.Identity()
        if config.text_only
        else _projector(config.projector, config.vision.transformer.width, config.decoder.transformer.width),
        SlotsFusion() if config.fusion.kind == "slots" else CrossFusion(config.decoder.transformer.width),
        _decoder(config, vocab_size),
        prefix_lm=config.mask.kind == "prefix",
    )


def initialize_weights(model: VisionLanguageModel) -> None:
    """Initialize the weights of a model in place. The weights of linear layers and convolutions get a variance of
    1 / fan_in.

    - In the blocks of encoder and decoder, the weights of layers that write into the residual stream are also divided
      by sqrt(2 * depth).
    - The output head, embedding tables, the encoder's position vectors and learned tokens other than the class token
      get a standard deviation of 0.02, so that the first loss is about log(vocabulary size). A larger standard
      deviation of the head makes the start of training unstable.
    - Routers also get a standard deviation of 0.02. If a router starts with large weights, it hardly changes its choice
      of experts during training.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | GroupedLinear):
            fan_in = module.weight.shape[2 if isinstance(module, GroupedLinear) else 1 :].numel()
            nn.init.normal_(module.weight, std=fan_in**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, MixedRotary):
            module.initialize()
    for stack in (model.encoder.blocks, model.decoder.blocks):
        for block in stack:
            assert isinstance(block, Block)
            for part in (block.attention.out, block.mlp.out):
                assert isinstance(part, nn.Linear | GroupedLinear)
                with torch.no_grad():
                    part.weight.mul_((2 * len(stack)) ** -0.5)
    if model.encoder.position is not None:
        nn.init.normal_(model.encoder.position, std=0.02)
    for name, parameter in model.named_parameters():
        if name.endswith((".registers", ".query", ".latents", ".marker", ".router.weight", ".noise.weight")):
            nn.init.normal_(parameter, std=0.02)
    nn.init.normal_(model.decoder.head.weight, std=0.02)


def _encoder(config: ModelConfig) -> VisionEncoder:
    vision, transformer = config.vision, config.vision.transformer
    rotary, relative = _patch_positions(config)
    return VisionEncoder(
        _stem(vision.stem, transformer.width),
        _blocks(transformer),
        _norm(transformer.norm, transformer.width) if vision.pre_norm else nn.Identity(),
        _norm(transformer.norm, transformer.width) if vision.post_norm else nn.Identity(),
        _pool(vision) if vision.select == "attention" else None,
        num_patches=config.num_patches,
        width=transformer.width,
        class_token=vision.class_token,
        registers=vision.registers,
        position_on=vision.position_on if adds_position_vectors(transformer.position) else None,
        select=vision.select,
        dropout=transformer.dropout,
        rotary=rotary,
        relative=relative,
    )


def _patch_positions(config: ModelConfig) -> tuple[AxialRotary | MixedRotary | None, list[RelativeBias]]:
    """Return the encoder's module for rotary positions, and the encoder's modules for biases of attention scores."""
    vision, transformer = config.vision, config.vision.transformer
    attention, position = transformer.attention, transformer.position
    grid = {"side": config.image.size // vision.stem.stride, "extra": vision.class_token + vision.registers}
    match position.kind:
        case "axial":
            return AxialRotary(position, head_dim=attention.head_dim, **grid), []
        case "mixed":
            heads = {"num_heads": attention.num_heads, "head_dim": attention.head_dim}
            return MixedRotary(depth=transformer.depth, **heads, **grid), []
        case "relative":
            count = 1 if position.shared else transformer.depth
            return None, [RelativeBias(attention.num_heads, position.mlp_width, **grid) for _ in range(count)]
        case _:
            return None, []


def _pool(vision: VisionConfig) -> AttentionPool:
    width, heads = vision.transformer.width, vision.transformer.attention
    attention = CrossAttention(width, width, num_heads=heads.num_heads, head_dim=heads.head_dim, bias=heads.bias)
    return AttentionPool(
        attention, _norm(vision.transformer.norm, width), _mlp(vision.transformer.mlp, width), width=width
    )


def _decoder(config: ModelConfig, vocab_size: int) -> Decoder:
    transformer, context = config.decoder.transformer, config.decoder.context
    width = transformer.width
    tokens = nn.Embedding(vocab_size, width)
    head = nn.Linear(width, vocab_size, bias=False)
    if config.decoder.tie_embeddings:
        head.weight = tokens.weight
    rotary, position = None, None
    match transformer.position.kind:
        case "rotary":
            rotary = Rotary(transformer.attention.head_dim, context, transformer.position.base)
        case "learned":
            position = nn.Embedding(context, width)
    return Decoder(
        tokens,
        _blocks(transformer),
        _norm(transformer.norm, width),
        head,
        position=position,
        rotary=rotary,
        dropout=transformer.dropout,
        embedding_scale=math.sqrt(width) if config.decoder.scale_embeddings else 1.0,
        soft_cap=config.decoder.soft_cap,
        cross_blocks=_cross_blocks(config.fusion, transformer) if config.fusion.kind == "cross_attention" else (),
    )


def _cross_blocks(fusion: CrossFusionConfig, transformer: TransformerConfig) -> list[GatedCrossBlock]:
    width, norm = transformer.width, transformer.norm
    return [
        GatedCrossBlock(
            CrossAttention(width, width, num_heads=fusion.num_heads, head_dim=fusion.head_dim, bias=False),
            _mlp(fusion.mlp, width),
            _two_norms(norm, width),
        )
        for _ in range(transformer.depth // fusion.every)
    ]


def _blocks(config: TransformerConfig) -> list[Block]:
    width, attention = config.width, config.attention
    return [
        Block(
            Attention(
                width,
                num_heads=attention.num_heads,
                num_kv_heads=attention.num_kv_heads,
                head_dim=attention.head_dim,
                bias=attention.bias,
                out_bias=attention.has_out_bias,
                dropout=config.dropout,
                window=attention.windows[layer % len(attention.windows)],
                soft_cap=attention.soft_cap,
                scale=attention.scale,
                qk_norms=_two_norms(config.norm, attention.head_dim) if attention.qk_norm else None,
            ),
            _mlp(config.mlp, width),
            _input_norms(config),
            config.dropout,
            width=width,
            post_norms=_two_norms(config.norm, width) if config.sandwich else None,
            layer_scale=config.layer_scale,
            skip_probability=config.stochastic_depth * (layer + 1) / config.depth,
        )
        for layer in range(config.depth)
    ]


def _input_norms(config: TransformerConfig) -> tuple[nn.Module, nn.Module | None]:
    if not config.input_norms:
        return nn.Identity(), nn.Identity()
    return _norm(config.norm, config.width), None if config.parallel else _norm(config.norm, config.width)


def _two_norms(config: NormConfig, width: int) -> tuple[nn.Module, nn.Module]:
    return _norm(config, width), _norm(config, width)


def _mlp(config: MlpConfig, width: int) -> nn.Module:
    match config.kind:
        case "plain":
            activation = _ACTIVATIONS[config.activation]
            return PlainMlp(width, config.mlp_width, activation, bias=config.bias, out_width=width)
        case "gated":
            return GatedMlp(width, config.mlp_width, _ACTIVATIONS[config.activation], bias=config.bias)
        case "moe":
            return _moe(config, width)


def _moe(config: MoeMlpConfig, width: int) -> MoeMlp:
    expert = config.expert
    kinds: dict[str, type[PlainExperts | GatedExperts]] = {"plain": PlainExperts, "gated": GatedExperts}
    return MoeMlp(
        width,
        kinds[expert.kind](
            config.num_experts, width, expert.mlp_width, _ACTIVATIONS[expert.activation], bias=expert.bias
        ),
        top_k=config.top_k,
        noisy=config.noisy,
        balance_weight=config.balance_weight,
        z_weight=config.z_weight,
    )


def _norm(config: NormConfig, width: int) -> nn.Module:
    match config.kind:
        case "layer":
            return nn.LayerNorm(width, eps=config.eps)
        case "rms":
            return OffsetRmsNorm(width, config.eps) if config.offset else nn.RMSNorm(width, eps=config.eps)


def _stem(config: StemConfig, width: int) -> nn.Module:
    match config.kind:
        case "patch":
            return PatchStem(config.patch_size, width, bias=config.bias)
        case "conv":
            return ConvStem(config.channels, config.blocks or [0] * len(config.channels), width)


def _projector(config: ProjectorConfig, width: int, out_width: int) -> nn.Module:
    match config.kind:
        case "linear":
            return nn.Linear(width, out_width)
        case "mlp":
            activation = _ACTIVATIONS[config.activation]
            return PlainMlp(width, config.mlp_width, activation, bias=True, out_width=out_width)
        case "pixel_shuffle":
            return PixelShuffle(width, out_width, config.factor)
        case "resampler":
            return _resampler(config, width, out_width)


def _resampler(config: ResamplerProjectorConfig, width: int, out_width: int) -> Resampler:
    blocks = [
        ResamplerBlock(
            CrossAttention(width, width, num_heads=config.num_heads, head_dim=config.head_dim, bias=False),
            _mlp(config.mlp, width),
            width=width,
        )
        for _ in range(config.depth)
    ]
    return Resampler(blocks, nn.LayerNorm(width), nn.Linear(width, out_width), num_latents=config.num_latents)

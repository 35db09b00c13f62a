"""From config to model: the only place that picks a class by `kind`."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional as F

from vlm.config import (
    Activation,
    ModelConfig,
    MoeMlpConfig,
    NormConfig,
    ProjectorConfig,
    StemConfig,
    TransformerConfig,
)
from vlm.decoder import Decoder
from vlm.layers.attention import Attention
from vlm.layers.block import Block
from vlm.layers.mlp import Activate, GatedMlp, PlainMlp
from vlm.layers.moe import GatedExperts, GroupedLinear, MoeMlp, PlainExperts
from vlm.layers.position import Rotary
from vlm.model import VisionLanguageModel
from vlm.vision import ConvStem, PatchStem, VisionEncoder

_ACTIVATIONS: dict[Activation, Activate] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def build_model(config: ModelConfig, vocab_size: int) -> VisionLanguageModel:
    """A model with fresh weights drawn from torch's global generator: seed it first."""
    model = VisionLanguageModel(
        config,
        _encoder(config),
        _projector(config.projector, config.vision.transformer.width, config.decoder.transformer.width),
        _decoder(config, vocab_size),
        prefix_lm=config.mask.kind == "prefix",
    )
    initialize(model)
    return model


def initialize(model: VisionLanguageModel) -> None:
    """Fresh weights: variance 1/fan_in, outputs into the residual stream divided by sqrt(2 * depth).

    Head and token table have standard deviation 0.02 whatever their fan-in, so the first loss is log(vocabulary): a
    larger head wrecks the start of training.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=fan_in**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, GroupedLinear):
            nn.init.normal_(module.weight, std=module.weight.shape[-1] ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for stack in (model.encoder.blocks, model.decoder.blocks):
        for block in stack:
            assert isinstance(block, Block)
            mlp = block.mlp
            if isinstance(mlp, MoeMlp):
                mlp.initialize()
            for part in (block.attention.out, mlp.experts.out if isinstance(mlp, MoeMlp) else mlp.out):
                assert isinstance(part, nn.Linear | GroupedLinear)
                with torch.no_grad():
                    part.weight.mul_((2 * len(stack)) ** -0.5)
    nn.init.normal_(model.encoder.position, std=0.02)
    nn.init.normal_(model.decoder.head.weight, std=0.02)


def _encoder(config: ModelConfig) -> VisionEncoder:
    vision = config.vision
    return VisionEncoder(
        _stem(vision.stem, vision.transformer.width),
        _blocks(vision.transformer, rotary=None),
        _norm(vision.transformer.norm, vision.transformer.width),
        num_patches=config.num_patches,
        width=vision.transformer.width,
        class_token=vision.class_token,
        select=vision.select,
        dropout=vision.transformer.dropout,
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
        position,
        _blocks(transformer, rotary=rotary),
        _norm(transformer.norm, width),
        head,
        dropout=transformer.dropout,
    )


def _blocks(config: TransformerConfig, *, rotary: Rotary | None) -> list[Block]:
    return [
        Block(
            Attention(
                config.width,
                num_heads=config.attention.num_heads,
                num_kv_heads=config.attention.num_kv_heads,
                head_dim=config.attention.head_dim,
                bias=config.attention.bias,
                dropout=config.dropout,
                rotary=rotary,
            ),
            _mlp(config),
            _norm(config.norm, config.width),
            _norm(config.norm, config.width),
            config.dropout,
        )
        for _ in range(config.depth)
    ]


def _mlp(config: TransformerConfig) -> nn.Module:
    mlp, width = config.mlp, config.width
    match mlp.kind:
        case "plain":
            return PlainMlp(width, mlp.mlp_width, _ACTIVATIONS[mlp.activation], bias=mlp.bias, out_width=width)
        case "gated":
            return GatedMlp(width, mlp.mlp_width, _ACTIVATIONS[mlp.activation], bias=mlp.bias)
        case "moe":
            return _moe(mlp, width)


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
            return nn.RMSNorm(width, eps=config.eps)


def _stem(config: StemConfig, width: int) -> nn.Module:
    match config.kind:
        case "patch":
            return PatchStem(config.patch_size, width)
        case "conv":
            return ConvStem(config.channels, width)


def _projector(config: ProjectorConfig, width: int, out_width: int) -> nn.Module:
    match config.kind:
        case "linear":
            return nn.Linear(width, out_width)
        case "mlp":
            return PlainMlp(width, config.mlp_width, F.gelu, bias=True, out_width=out_width)

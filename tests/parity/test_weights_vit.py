"""ViT encoders give the same features as in transformers and timm after import, after export and after resampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from tiny_published_models import (
    DEPTH,
    HEADS,
    MLP,
    PATCH,
    SIZE,
    WIDTH,
    assert_equal,
    blocks,
    config,
    load,
    pixels,
    publish,
    scramble,
    send_back,
)
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from vlm.config import ModelConfig
from vlm.errors import CheckpointError

VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": MLP,
    "image_size": SIZE,
    "patch_size": PATCH,
}


@pytest.mark.parametrize(("bare", "qkv_bias"), [(True, True), (True, False), (False, True)])
def test_vit_encoder_gives_the_original_features_after_import_and_export(
    bare: bool, qkv_bias: bool, tmp_path: Path
) -> None:
    kind = ViTModel if bare else ViTForImageClassification
    original = publish(kind(ViTConfig(**VISION, qkv_bias=qkv_bias)), tmp_path / "published")
    transformer = blocks(eps=1e-12)
    transformer["attention"] |= {"bias": qkv_bias, "out_bias": True}
    settings = config(vision={"class_token": True, "transformer": transformer})
    model, _ = load(settings, tmp_path / "published", "encoder")
    theirs = (original if bare else original.vit)(pixels()).last_hidden_state[:, 1:]
    assert_equal(model.encoder(pixels()), theirs)
    head = "vit.pooler.dense" if bare else "classifier"
    exported = send_back(model, "encoder", "vit", tmp_path / "published", f"{head}.weight", f"{head}.bias")
    assert_equal(ViTModel.from_pretrained(exported)(pixels()).last_hidden_state[:, 1:], theirs)


# ------------------------------------------------------------------------------------------------ timm


def publish_timm(folder: Path, **arguments: Any) -> VisionTransformer:
    """Save a tiny timm model in timm's format: config.json has the architecture's name and only some arguments."""
    sizes = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    model = VisionTransformer(**sizes, mlp_ratio=MLP / WIDTH, num_classes=3, **arguments).eval()
    scramble(model)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    settings = {"architecture": "vit_base_patch4_16", "num_features": WIDTH, "model_args": {"num_heads": HEADS}}
    (folder / "config.json").write_text(json.dumps(settings))
    return model


def features(model: VisionTransformer, size: int = SIZE) -> Tensor:
    """Return the output of a timm encoder: the patch vectors, or the vector of the pooling query."""
    hidden = model.forward_features(pixels(size=size))
    selected: Tensor = hidden[:, model.num_prefix_tokens :] if model.attn_pool is None else model.pool(hidden)[:, None]
    return selected


GAP: dict[str, Any] = {"class_token": False, "reg_tokens": 4, "no_embed_class": True, "global_pool": "avg"}
OUR_GAP: dict[str, Any] = {"registers": 4, "position_on": "patches", "post_norm": False}
SCALED = blocks(eps=1e-6, layer_scale=1e-5)
HEAD = ("head.weight", "head.bias")
TIMM = {
    "registers and layer scale": (
        {**GAP, "init_values": 1e-5},
        {**OUR_GAP, "transformer": SCALED},
        ("fc_norm.weight", "fc_norm.bias", *HEAD),
    ),
    "class token": ({}, {"class_token": True, "transformer": blocks(eps=1e-6)}, HEAD),
    "registers with positions": (
        {"reg_tokens": 2, "init_values": 1e-5},
        {"class_token": True, "registers": 2, "transformer": SCALED},
        HEAD,
    ),
    "attention pooling": (
        {"class_token": False, "global_pool": "map"},
        {"select": "attention", "transformer": blocks(eps=1e-6)},
        HEAD,
    ),
    "norm before the blocks": (
        {"pre_norm": True},
        {
            "class_token": True,
            "pre_norm": True,
            "stem": {"kind": "patch", "patch_size": PATCH, "bias": False},
            "transformer": blocks(eps=1e-6),
        },
        HEAD,
    ),
}


@pytest.mark.parametrize("make", TIMM)
def test_timm_encoder_gives_the_original_features_after_import_and_export(make: str, tmp_path: Path) -> None:
    arguments, vision, missing = TIMM[make]
    original = publish_timm(tmp_path / "published", **arguments)
    model, report = load(config(vision=vision), tmp_path / "published", "encoder")
    assert_equal(model.encoder(pixels()), features(original))
    assert [path.partition(" ")[0] for path in report.parts[0].unchecked] == [
        *("image.filter", "image.resize", "image.crop_start")
    ], "config.json has no pretrained_cfg"
    exported = send_back(model, "encoder", "timm", tmp_path / "published", *missing)
    again = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    assert_equal(features(again), features(original))


@pytest.mark.parametrize("size", [SIZE - PATCH, SIZE + 2 * PATCH])
@pytest.mark.parametrize("make", ["registers and layer scale", "registers with positions"])
def test_timm_encoder_with_resampled_positions_gives_the_original_features(
    make: str, size: int, tmp_path: Path
) -> None:
    arguments, vision, _ = TIMM[make]
    original = publish_timm(tmp_path / "published", **arguments)
    extra = 0 if original.no_embed_class else original.num_prefix_tokens
    side = size // PATCH
    table = resample_abs_pos_embed(original.pos_embed, [side, side], num_prefix_tokens=extra)
    model, report = load(config(vision=vision, size=size), tmp_path / "published", "encoder")
    torch.testing.assert_close(model.encoder.position, table, rtol=0, atol=1e-6)
    assert report.parts[0].resampled
    original.set_input_size((size, size))
    assert_equal(model.encoder(pixels(size=size)), features(original, size))


ARCHITECTURES = (
    "vit_tiny_patch16_224",
    "vit_base_patch16_gap_224",
    "vit_betwixt_patch16_reg4_gap_256",
    "vit_mediumd_patch16_reg4_gap_384",
    "vit_large_patch14_clip_quickgelu_224",
    "vit_base_patch16_clip_224",
    "vit_huge_patch14_224",
    "vit_giantopt_patch16_siglip_256",
    "vit_so400m_patch14_siglip_224",
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_config_values_that_a_timm_architecture_name_implies_equal_the_values_in_timm(
    architecture: str, tmp_path: Path
) -> None:
    with torch.device("meta"):
        built = timm.create_model(architecture)
    attention, mlp = built.blocks[0].attn, built.blocks[0].mlp
    names = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}
    heads = {"num_heads": attention.num_heads, "num_kv_heads": attention.num_heads, "head_dim": attention.head_dim}
    settings = config(
        vision={
            "pre_norm": isinstance(built.norm_pre, torch.nn.LayerNorm),
            "stem": {"kind": "patch", "patch_size": 4, "bias": built.patch_embed.proj.bias is not None},
            "transformer": {
                "width": built.embed_dim,
                "depth": len(built.blocks),
                "attention": {**heads, "bias": True},
                "mlp": {"kind": "plain", "mlp_width": 64, "activation": names[type(mlp.act).__name__]},
                "norm": {"kind": "layer", "eps": built.blocks[0].norm1.eps},
            },
        }
    )
    assert mismatches(settings, {"architecture": architecture, "num_features": built.embed_dim}) == []
    wrong = settings.model_dump()
    wrong["vision"]["transformer"]["attention"] |= {"num_heads": 1, "num_kv_heads": 1}
    sentences = mismatches(ModelConfig.model_validate(wrong), {"architecture": architecture, "num_features": WIDTH})
    assert any("num_heads" in sentence for sentence in sentences)


def mismatches(settings: ModelConfig, published: dict[str, Any]) -> list[str]:
    from vlm.weights.tables import families

    family = next(family for family in families() if family.name == "timm")
    return family.mismatches(settings, published)


def test_import_error_for_timm_weights_without_biases_names_all_missing_biases(tmp_path: Path) -> None:
    publish_timm(tmp_path / "published", **GAP, qkv_bias=False)
    with pytest.raises(CheckpointError) as caught:
        load(config(vision={**OUR_GAP, "transformer": blocks(eps=1e-6)}), tmp_path / "published", "encoder")
    assert "missing in the file: blocks.{0..2}.attn.qkv.bias" in str(caught.value)

"""Each imported `vit_*` or `deit*` architecture has the same features as in timm, or is refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import (
    GluMlp,
    LayerScale,
    RelPosMlp,
    RmsNorm,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    SwiGLU,
)
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from timm.models.vision_transformer_relpos import ResPostRelPosBlock
from tiny_published_models import assert_equal, config, scramble
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vlm.config import ModelConfig
from vlm.factory import build_model
from vlm.weights.family import Family
from vlm.weights.files import TensorHeader
from vlm.weights.load import import_weights
from vlm.weights.plan import plan_load
from vlm.weights.tables import families

ENCODERS = [family for family in families() if family.name.startswith("timm")]
ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}
NAMES = [*timm.list_models("vit_*"), *timm.list_models("deit*")]


class WithoutInitialization(TorchFunctionMode):
    """Skip the random initialisation of weights inside the block, because the initialisation would take most of the
    test's time."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("normal_", "uniform_", "erfinv_", "clamp_", "kaiming_uniform_", "trunc_normal_"):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def refused_axis(name: str) -> list[str]:
    """Return the error sentences about parts that our encoder lacks and that the name of an architecture promises."""
    sentences = family_of(name).mismatches(config(), {"architecture": name})
    return [sentence for sentence in sentences if "which has" in sentence]


def family_of(name: str) -> Family:
    """Return the only family that accepts an architecture of this name."""
    (family,) = (each for each in ENCODERS if each.select_settings({"architecture": name}) is not None)
    return family


def position_of(theirs: Any) -> dict[str, Any]:
    """Read the positions of a timm model from its modules, and return them as our position config."""
    biases = [each for each in theirs.modules() if isinstance(each, RelPosMlp)]
    if biases:
        shared = theirs.shared_rel_pos is not None
        return {"kind": "relative", "mlp_width": biases[0].mlp.fc1.out_features, "shared": shared}
    rope = getattr(theirs, "rope", None)
    if rope is None:
        return {"kind": "learned"}
    if isinstance(rope, RotaryEmbeddingMixed):
        return {"kind": "mixed", "learned": theirs.pos_embed is not None}
    centred = isinstance(rope, RotaryEmbeddingDinoV3)
    reference = None if centred else rope.ref_feat_shape
    return {
        "kind": "axial",
        "base": rope.temperature,
        "coordinates": "centred" if centred else "index",
        "offset": rope.grid_offset,
        "grid": None if reference is None else reference[0],
        "first": "column" if rope.grid_indexing == "xy" else "row",
        "learned": theirs.pos_embed is not None,
    }


def our_config(theirs: Any) -> ModelConfig:
    """Return a config of our model whose encoder is the same as that of a timm model."""
    position = getattr(theirs, "pos_embed", None)
    patch = theirs.patch_embed.patch_size[0]
    rows = theirs.patch_embed.num_patches
    preprocessing = theirs.pretrained_cfg
    return config(
        decoder={"context": 8192},
        image={"size": theirs.patch_embed.grid_size[0] * patch, **{k: preprocessing[k] for k in ("mean", "std")}},
        vision={
            "stem": {"kind": "patch", "patch_size": patch, "bias": theirs.patch_embed.proj.bias is not None},
            "class_token": theirs.cls_token is not None,
            "registers": theirs.num_prefix_tokens - (theirs.cls_token is not None),
            "position_on": "patches" if position is not None and position.shape[1] == rows else "all",
            "pre_norm": not isinstance(getattr(theirs, "norm_pre", nn.Identity()), nn.Identity),
            "post_norm": not isinstance(theirs.norm, nn.Identity),
            "select": "attention" if pools(theirs) else "patches",
            "transformer": {
                "width": theirs.embed_dim,
                "depth": len(theirs.blocks),
                "position": position_of(theirs),
                **block_config(theirs.blocks[0]),
            },
        },
    )


def pools(theirs: Any) -> bool:
    """Return True if a timm model pools by attention and has no rotary positions.

    For a model of this kind, the test compares the pooled features. For any other model, the test compares the features
    of the patches.
    """
    return getattr(theirs, "attn_pool", None) is not None and getattr(theirs, "rope", None) is None


def block_config(block: Any) -> dict[str, Any]:
    """Return the part of our transformer config that describes a block of timm."""
    if isinstance(block, ParallelScalingBlock):
        return parallel_config(block)
    branches = len(block.attns) if isinstance(block, ParallelThingsBlock) else 1
    attention, mlp = (block.attns[0].attn, block.ffns[0].mlp) if branches > 1 else (block.attn, block.mlp)
    norm = block.attns[0].norm if branches > 1 else block.norm1
    after = isinstance(block, ResPostBlock | ResPostRelPosBlock)
    gated = isinstance(mlp, GluMlp | SwiGLU)
    return {
        "attention": {
            "num_heads": branches * attention.num_heads,
            "num_kv_heads": branches * attention.num_heads,
            "head_dim": attention.head_dim,
            "bias": attention.qkv.bias is not None or getattr(attention, "q_bias", None) is not None,
            "out_bias": attention.proj.bias is not None,
        },
        "mlp": {
            "kind": "gated" if gated else "plain",
            "mlp_width": branches * mlp.fc2.in_features,
            "activation": ACTIVATIONS[type(mlp.act).__name__],
            "bias": True,
        },
        "norm": {"kind": "layer", "eps": norm.eps},
        "sandwich": after,
        "input_norms": not after,
        "layer_scale": 1e-5 if has_layer_scale(block) else None,
    }


def parallel_config(block: Any) -> dict[str, Any]:
    """Return the part of our transformer config that describes a block with attention and MLP in parallel."""
    return {
        "parallel": True,
        "attention": {
            "num_heads": block.num_heads,
            "num_kv_heads": block.num_heads,
            "head_dim": block.head_dim,
            "bias": block.in_proj.bias is not None,
            "out_bias": True,
            "qk_norm": not isinstance(block.q_norm, nn.Identity),
        },
        "mlp": {"kind": "plain", "mlp_width": block.mlp_out_proj.in_features, "activation": "gelu"},
        "norm": {"kind": "rms" if isinstance(block.in_norm, RmsNorm) else "layer", "eps": block.in_norm.eps},
        "layer_scale": 1e-5 if isinstance(block.ls, LayerScale) else None,
    }


def has_layer_scale(block: Any) -> bool:
    return getattr(block, "gamma_1", None) is not None or isinstance(getattr(block, "ls1", None), LayerScale)


def published_settings(name: str, theirs: Any) -> dict[str, Any]:
    """Return a short config.json of an architecture, with some of the keys that timm publishes."""
    preprocessing = {key: theirs.pretrained_cfg[key] for key in ("mean", "std", "input_size")}
    return {"architecture": name, "num_features": theirs.num_features, "pretrained_cfg": preprocessing}


def problems(name: str) -> list[str]:
    """Return the reasons to refuse an architecture.

    If the name of the architecture gives no reason, build the architecture with two blocks on the meta device, and
    compare its settings and tensors with our model.
    """
    axis = refused_axis(name)
    if axis:
        return axis
    with torch.device("meta"), WithoutInitialization():
        theirs = timm.create_model(name, depth=2)
        ours = our_config(theirs)
        model = build_model(ours, 40)
    headers = {key: TensorHeader(tuple(value.shape), "F32", Path()) for key, value in theirs.state_dict().items()}
    parameters = {key: value for key, value in model.named_parameters() if key.startswith("encoder.")}
    family = family_of(name)
    names = family.canonical_names(headers)
    plan = plan_load(family.table(ours), parameters, {key: headers[found] for key, found in names.items()})
    return [*family.mismatches(ours, published_settings(name, theirs)), *plan.problems]


def test_every_vit_architecture_of_timm_is_accepted_or_refused_with_the_unsupported_feature_named() -> None:
    refused = {name: found for name in NAMES if (found := problems(name))}
    unexplained = {
        name: found
        for name, found in refused.items()
        if len(found) != 1 or ("which has" not in found[0] and "pixels with patches of" not in found[0])
    }
    assert unexplained == {}
    accepted = [name for name in NAMES if name not in refused]
    assert sum(name.startswith("vit_") for name in accepted) >= 190
    assert all(name in accepted for name in NAMES if name.startswith("deit"))


SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32}
RUN = (
    "vit_tiny_patch16_224", "vit_base_patch8_224", "vit_base_patch16_gap_224", "vit_base_patch16_224_miil",
    "vit_medium_patch16_gap_256", "vit_betwixt_patch16_gap_256", "vit_so150m2_patch16_reg1_gap_256",
    "vit_mediumd_patch16_reg4_gap_256", "vit_base_patch16_reg4_gap_256", "vit_so150m_patch16_reg4_map_256",
    "vit_base_patch16_siglip_224", "vit_so400m_patch16_siglip_256", "vit_base_patch16_clip_224",
    "vit_base_patch16_clip_quickgelu_224", "vit_small_patch16_36x1_224", "vit_base_patch16_radio_v3",
    "vit_giant_patch14_dinov2", "vit_giant_patch14_reg4_dinov2", "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "vit_small_patch16_rope_224",
    "vit_small_patch16_rope_ape_224", "vit_medium_patch16_rope_reg1_gap_256", "vit_small_patch16_dinov3",
    "vit_small_plus_patch16_dinov3_qkvb", "vit_small_patch16_lingbot", "vit_pe_core_small_patch16_384",
    "vit_pe_spatial_tiny_patch16_512", "vit_small_patch16_rope_mixed_224", "vit_base_patch16_rope_mixed_ape_224",
    "vit_relpos_small_patch16_224", "vit_relpos_base_patch16_cls_224", "vit_relpos_medium_patch16_rpn_224",
    "vit_srelpos_small_patch16_224", "vit_base_patch16_rpn_224", "vit_base_patch16_xp_224",
    "vit_pwee_patch16_reg1_gap_256", "vit_small_patch16_18x2_224",
)  # fmt: skip


def features(theirs: Any, pixels: Tensor) -> Tensor:
    hidden = theirs.forward_features(pixels)
    if pools(theirs):
        pooled: Tensor = theirs.pool(hidden)[:, None]
        return pooled
    patches: Tensor = hidden[:, theirs.num_prefix_tokens :]
    return patches


@pytest.mark.parametrize("name", RUN)
def test_a_small_model_of_each_timm_architecture_gives_the_same_features_as_timm(name: str, tmp_path: Path) -> None:
    sizes = {**SMALL, "img_size": 28} if "patch14" in name else SMALL
    theirs = timm.create_model(name, **sizes).eval()
    scramble(theirs)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    settings = {**published_settings(name, theirs), "model_args": {"num_heads": SMALL["num_heads"]}}
    settings["pretrained_cfg"] = {}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    ours = our_config(theirs)
    model, _ = import_weights(ours, 40, {"encoder": tmp_path})
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, ours.image.size, ours.image.size, generator=generator)
    with torch.no_grad():
        assert_equal(model.encoder(pixels), features(theirs, pixels))

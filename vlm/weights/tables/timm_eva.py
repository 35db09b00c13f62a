"""Vision transformers of timm with rotary positions over two dimensions, which timm builds with its class `Eva`.

The architectures are RoPE-ViT (Heo et al., 2024), DINOv3 (Simeoni et al., 2025), LingBot, and the Perception Encoder
(Bolya et al., 2025). In the family `timm_rope`, queries, keys and values have one joint bias. The family `timm_eva` has
biases of queries and values only, so the bias of our keys is zero. The frequencies of the rotation are constant, or are
weights in architectures with `rope_mixed` in their name.

A rotary position encoding rotates pairs of channels. In architectures that count rows and columns, timm pairs adjacent
channels. In DINOv3 and LingBot, timm pairs each channel of the first half of a head with a channel of the second half.
Lakesight's attention always pairs channels of the two halves. If an architecture pairs adjacent channels, an import
reorders the channels of queries and keys. The reordering does not change the dot products of queries and keys.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlm.config import AttentionConfig, ModelConfig
from vlm.weights.config_fields import UNKNOWN, ConfigField, Settings, value_at
from vlm.weights.family import Family
from vlm.weights.rules import Drop, Rule, WeightTable, concat, rename
from vlm.weights.tables import timm

POSITION = f"{timm.TRANSFORMER}.position"
HEADS_BY_NAME = {"vit_7b_": 32, "_gigantic_patch14_": 16}
"""Dict from a part of an architecture's name to the number of heads. The heads of these architectures are not 64 wide.
"""
GRIDS = {"_pe_core_base_": 14, "_pe_core_(small|tiny|large)_": 24, "_pe_": 32, "_rope_reg": 16}
"""Dict from regular expressions of architecture names to the size of a patch grid. Row and column indices are scaled to
this grid."""


def position_of(name: str) -> dict[str, Any]:
    """Return the settings of the positions that the name of an architecture implies."""
    axial = ("base", "coordinates", "offset", "grid", "first")
    if "_rope_mixed_" in name:
        return {"kind": "mixed", "learned": "_ape_" in name, **dict.fromkeys(axial)}
    if re.search(r"dinov3|lingbot", name):
        values = 100.0, "centred", 0.0, None, "row"
        return {"kind": "axial", "learned": False, **dict(zip(axial, values, strict=True))}
    published = "_pe_" in name
    return {
        "kind": "axial",
        "base": 10_000.0 if published or "_rope_reg" in name else 100.0,
        "coordinates": "index",
        "offset": float(published and "_gigantic_" not in name),
        "grid": next((grid for pattern, grid in GRIDS.items() if re.search(pattern, name)), None),
        "first": "row" if "_rope_reg" in name else "column",
        "learned": published or "_ape_" in name,
    }


def is_gated(name: str) -> bool:
    """Return True if the name of an architecture implies SwiGLU."""
    return bool(re.search(r"_plus_|vit_7b_|giant_patch16_lingbot", name))


def _num_heads(settings: Settings) -> Any:
    name, width = settings["architecture"], settings["embed_dim"]
    by_width = UNKNOWN if width is UNKNOWN else width // 64
    return settings.get("num_heads", next((n for part, n in HEADS_BY_NAME.items() if part in name), by_width))


FIELDS = (
    *timm.fields_except(
        *(f"{timm.TRANSFORMER}.{key}" for key in ("position.kind", "mlp.kind", "mlp.activation", "norm.eps")),
        *(f"{timm.HEADS}.{key}" for key in ("num_heads", "num_kv_heads")),
    ),
    *(timm.by_name(f"{POSITION}.{key}", lambda name, key=key: position_of(name)[key]) for key in position_of("")),  # type: ignore[misc]
    timm.by_name(f"{timm.TRANSFORMER}.mlp.kind", lambda name: "gated" if is_gated(name) else "plain"),
    timm.by_name(f"{timm.TRANSFORMER}.mlp.activation", lambda name: "silu" if is_gated(name) else "gelu"),
    timm.by_name(f"{timm.TRANSFORMER}.norm.eps", lambda name: 1e-6 if "_rope_" in name else 1e-5),
    *(
        ConfigField(f"{timm.HEADS}.{key}", "num_heads", value_at(f"{timm.HEADS}.{key}"), _num_heads)
        for key in ("num_heads", "num_kv_heads")
    ),
)


# ------------------------------------------------------------------------------------------------ channels of a head


def _halves(rows: Tensor, attention: AttentionConfig) -> Tensor:
    """Reorder the rows of queries or keys: the two rows of a pair move from adjacent places to the two halves of the
    head.
    """
    return torch.unflatten(rows, 0, (attention.num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _pairs(rows: Tensor, attention: AttentionConfig) -> Tensor:
    """Reorder the rows of queries or keys: the two rows of a pair move from the two halves of the head to adjacent
    places.
    """
    return torch.unflatten(rows, 0, (attention.num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _reordered(theirs: str, ours: str, attention: AttentionConfig) -> Rule:
    """Return a rule that reorders the rows of queries and keys, and keeps the rows of values."""

    def read(tensors: Sequence[Tensor]) -> list[Tensor]:
        q, k, v = tensors[0].chunk(3)
        return [torch.cat((_halves(q, attention), _halves(k, attention), v))]

    def write(tensors: Sequence[Tensor]) -> list[Tensor]:
        q, k, v = tensors[0].chunk(3)
        return [torch.cat((_pairs(q, attention), _pairs(k, attention), v))]

    return Rule((theirs,), (ours,), read, write)


def _without_key_bias(theirs: Sequence[str], ours: str, attention: AttentionConfig, *, reorder: bool) -> Rule:
    """Return a rule that joins the biases of queries and values, and fills the bias of keys with zeros."""

    def read(tensors: Sequence[Tensor]) -> list[Tensor]:
        q, v = tensors
        return [torch.cat((_halves(q, attention) if reorder else q, torch.zeros_like(q), v))]

    def write(tensors: Sequence[Tensor]) -> list[Tensor]:
        q, _, v = tensors[0].chunk(3)
        return [_pairs(q, attention) if reorder else q, v]

    return Rule(tuple(theirs), (ours,), read, write)


# ------------------------------------------------------------------------------------------------ families


def _table(config: ModelConfig, *, separate_biases: bool) -> WeightTable:
    transformer = config.vision.transformer
    attention, position, mlp = transformer.attention, transformer.position, transformer.mlp
    assert position.kind in ("axial", "mixed"), "config fields are compared before a table is built"
    assert mlp.kind != "moe", "config fields are compared before a table is built"
    reorder = position.kind == "mixed" or position.coordinates == "index"
    ours = "encoder.blocks.{i}.attention.qkv."
    weight, bias = "blocks.{i}.attn.qkv.weight", "blocks.{i}.attn.qkv.bias"
    own = [
        _reordered(weight, f"{ours}weight", attention) if reorder else rename(weight, f"{ours}weight"),
        rename("blocks.{i}.gamma_1", "encoder.blocks.{i}.attention_scale"),
        rename("blocks.{i}.gamma_2", "encoder.blocks.{i}.mlp_scale"),
        rename("rope.freqs", "encoder.rotary.frequency"),
        concat(
            ["blocks.{i}.mlp.fc1_g.*", "blocks.{i}.mlp.fc1_x.*"],
            "encoder.blocks.{i}.mlp.gate_up.*",
            (mlp.mlp_width, mlp.mlp_width),
        ),
    ]
    if separate_biases:
        biases = ["blocks.{i}.attn.q_bias", "blocks.{i}.attn.v_bias"]
        own.append(_without_key_bias(biases, f"{ours}bias", attention, reorder=reorder))
    elif reorder:
        own.append(_reordered(bias, f"{ours}bias", attention))
    return timm.with_rules(timm.table(config), own, Drop("rope.periods", "constant angles of the positions"))


def _family(name: str, pattern: str, *, separate_biases: bool) -> Family:
    return Family(
        name,
        "encoder",
        timm.selector(pattern),
        FIELDS,
        lambda config: _table(config, separate_biases=separate_biases),
        fixed_settings={},
        without_effect=timm.WITHOUT_EFFECT,
        image_processor=None,
        exportable=False,
    )


FAMILIES = (
    _family("timm_rope", timm.ROPE, separate_biases=False),
    _family("timm_eva", timm.EVA, separate_biases=True),
)

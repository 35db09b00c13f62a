"""Full-size models have tensors with the same names and shapes as the originals, checked on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
)

from pipelines.config import load_model
from vlm.factory import build_model
from vlm.weights.family import Part
from vlm.weights.files import TensorHeader
from vlm.weights.load import in_published_part
from vlm.weights.plan import plan_load
from vlm.weights.tables import families

SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "vision_use_head": False,
}
GEMMA_2B = {
    "model_type": "gemma",
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "vocab_size": 257216,
}
GEMMA2_2B = {"model_type": "gemma2", "vocab_size": 257216}  # the defaults of the config class describe Gemma 2 2B


def paligemma(text: dict[str, Any], width: int) -> Callable[[], Any]:
    config = PaliGemmaConfig(vision_config=SO400M, text_config=text, projection_dim=width, hidden_size=width)
    return lambda: PaliGemmaForConditionalGeneration(config)


CLIP_L = CLIPVisionConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
)
GPT2_MEDIUM = GPT2Config(n_embd=1024, n_layer=24, n_head=16)


class Original(NamedTuple):
    """A published part of a model: our model, the part, the weight family, and a function that builds the original."""

    model: str
    part: Part
    family: str
    make: Callable[[], Any]


ORIGINALS = (
    Original("vit_gpt2", "encoder", "timm", lambda: timm.create_model("vit_mediumd_patch16_reg4_gap_384")),
    Original("vit_gpt2", "decoder", "gpt2", lambda: GPT2LMHeadModel(GPT2Config())),
    Original("clip_gpt2", "encoder", "clip", lambda: CLIPVisionModel(CLIPVisionConfig())),
    Original("clip_gpt2", "decoder", "gpt2", lambda: GPT2LMHeadModel(GPT2Config())),
    Original("flamingo", "encoder", "clip", lambda: CLIPVisionModel(CLIP_L)),
    Original("flamingo", "decoder", "gpt2", lambda: GPT2LMHeadModel(GPT2_MEDIUM)),
    Original("paligemma", "model", "paligemma", paligemma(GEMMA_2B, 2048)),
    Original("paligemma2", "model", "paligemma2", paligemma(GEMMA2_2B, 2304)),
)


@pytest.mark.parametrize("original", ORIGINALS, ids=lambda original: f"{original.model}-{original.part}")
def test_full_size_model_has_the_same_tensors_as_the_original_model(original: Original) -> None:
    config = load_model(original.model)
    assert config.text.kind == "json"
    with torch.device("meta"):
        model, theirs = build_model(config, config.text.vocab_size), original.make()
    (family,) = (f for f in families() if (f.name, f.part) == (original.family, original.part))
    if hasattr(theirs, "config"):
        assert family.mismatches(config, theirs.config.to_dict()) == []
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    names = family.canonical_names(shapes)
    headers = {name: TensorHeader(shapes[names[name]], "F32", Path()) for name in names}
    ours = {name: p for name, p in model.named_parameters() if in_published_part(name, original.part)}
    plan = plan_load(family.table(config), ours, headers)
    assert plan.problems == []
    used = {name for rule in plan.rules for name in rule.theirs}
    assert sum(torch.Size(headers[name].shape).numel() for name in used) == sum(p.numel() for p in ours.values())
    assert set(headers) == used | set(plan.tied) | set(plan.dropped)


def test_parameter_counts_equal_the_published_parameter_counts() -> None:
    published = {"vit_gpt2": 190, "clip_gpt2": 214, "paligemma": 2_923, "paligemma2": 3_032, "base": 214}
    for name, millions in published.items():
        config = load_model(name)
        assert config.text.kind != "chars"
        with torch.device("meta"):
            model = build_model(config, config.text.vocab_size)
        assert next(model.parameters()).is_meta, "the models would need 40 GB"
        assert sum(p.numel() for p in model.parameters()) // 10**6 == millions

"""CLIP's vision encoder gives the same features as in transformers, after import and after export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_published_models import PATCH, SIZE, assert_equal, blocks, config, load, pixels, publish, send_back
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from vlm.config import ModelConfig

TOWER: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
VISION: dict[str, Any] = {**TOWER, "image_size": SIZE, "patch_size": PATCH}
NORM = ("vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias")


def ours(**changes: Any) -> ModelConfig:
    vision = {
        "stem": {"kind": "patch", "patch_size": PATCH, "bias": False},
        "class_token": True,
        "pre_norm": True,
        "post_norm": False,
        "transformer": blocks(activation="quick_gelu"),
    }
    return config(vision=vision | changes)


def test_clip_encoder_gives_the_original_patch_features_after_import_and_export(tmp_path: Path) -> None:
    original = publish(CLIPVisionModel(CLIPVisionConfig(**VISION)), tmp_path / "published")
    model, report = load(ours(), tmp_path / "published", "encoder")
    theirs = original(pixels()).last_hidden_state[:, 1:]
    assert_equal(model.encoder(pixels()), theirs)
    assert [len(names) for names in report.parts[0].dropped.values()] == [2]
    exported = send_back(model, "encoder", "clip", tmp_path / "published", *NORM)
    assert_equal(CLIPVisionModel.from_pretrained(exported)(pixels()).last_hidden_state[:, 1:], theirs)


def test_clip_encoder_gives_the_original_pooled_feature_after_import_and_export(tmp_path: Path) -> None:
    original = publish(CLIPVisionModel(CLIPVisionConfig(**VISION)), tmp_path / "published")
    model, _ = load(ours(post_norm=True, select="cls"), tmp_path / "published", "encoder")
    theirs = original(pixels()).pooler_output
    assert_equal(model.encoder(pixels())[:, 0], theirs)
    exported = send_back(model, "encoder", "clip", tmp_path / "published")
    assert_equal(CLIPVisionModel.from_pretrained(exported)(pixels()).pooler_output, theirs)


def test_importing_a_complete_clip_model_ignores_its_text_encoder(tmp_path: Path) -> None:
    original = publish(CLIPModel(CLIPConfig(text_config=TOWER, vision_config=VISION)), tmp_path / "published")
    model, report = load(ours(), tmp_path / "published", "encoder")
    assert_equal(model.encoder(pixels()), original.vision_model(pixels()).last_hidden_state[:, 1:])
    assert {"the text tower", "a weight of the contrastive loss"} <= set(report.parts[0].dropped)


@pytest.mark.parametrize(("activation", "message"), [("gelu", "hidden_act"), ("relu", "hidden_act")])
def test_import_refuses_clip_weights_whose_activation_differs_from_the_model(
    activation: str, message: str, tmp_path: Path
) -> None:
    from vlm.errors import CheckpointError

    publish(CLIPVisionModel(CLIPVisionConfig(**VISION, hidden_act=activation)), tmp_path / "published")
    with pytest.raises(CheckpointError, match=message):
        load(ours(), tmp_path / "published", "encoder")

"""The vision encoders of SigLIP and SigLIP 2 give the same features as in transformers after import and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_published_models import PATCH, SIZE, assert_equal, blocks, config, load, pixels, publish, send_back
from torch import Tensor
from transformers import (
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from vlm.config import ModelConfig

TOWER: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
VISION: dict[str, Any] = {**TOWER, "image_size": SIZE, "patch_size": PATCH}
SIDE = SIZE // PATCH
HEAD = (
    "probe",
    *(f"attention.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")),
    *(f"{layer}.{kind}" for layer in ("layernorm", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")),
)


def ours(select: str, size: int = SIZE) -> ModelConfig:
    return config(vision={"select": select, "transformer": blocks(activation="gelu_tanh", eps=1e-6)}, size=size)


def selected(output: Any, select: str) -> Tensor:
    features: Tensor = output.last_hidden_state if select == "patches" else output.pooler_output[:, None]
    return features


def naflex(model: Any, size: int = SIZE) -> Any:
    """Convert pictures to flattened patches, and run transformers' SigLIP 2 encoder on the patches."""
    side = size // PATCH
    squares = pixels(size=size).unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 4, 5, 1)
    patches = squares.reshape(2, side * side, -1)
    mask = torch.ones(2, side * side, dtype=torch.long)
    return model(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=torch.tensor([[side, side]] * 2))


@pytest.mark.parametrize("select", ["patches", "attention"])
def test_siglip_encoder_gives_the_original_features_after_import_and_export(select: str, tmp_path: Path) -> None:
    original = publish(SiglipVisionModel(SiglipVisionConfig(**VISION)), tmp_path / "published")
    model, _ = load(ours(select), tmp_path / "published", "encoder")
    theirs = selected(original(pixels()), select)
    assert_equal(model.encoder(pixels()), theirs)
    missing = [f"vision_model.head.{name}" for name in HEAD] if select == "patches" else []
    exported = send_back(model, "encoder", "siglip", tmp_path / "published", *missing)
    assert_equal(selected(SiglipVisionModel.from_pretrained(exported)(pixels()), select), theirs)


def test_importing_a_complete_siglip_model_ignores_its_text_encoder(tmp_path: Path) -> None:
    original = publish(SiglipModel(SiglipConfig(text_config=TOWER, vision_config=VISION)), tmp_path / "published")
    model, report = load(ours("attention"), tmp_path / "published", "encoder")
    assert_equal(model.encoder(pixels()), selected(original.vision_model(pixels()), "attention"))
    assert set(report.parts[0].dropped) == {"the text tower", "a weight of the contrastive loss"}


@pytest.mark.parametrize("select", ["patches", "attention"])
def test_siglip2_encoder_gives_the_original_features_after_import_and_export(select: str, tmp_path: Path) -> None:
    settings = Siglip2VisionConfig(**TOWER, patch_size=PATCH, num_patches=SIDE**2)
    original = publish(Siglip2VisionModel(settings), tmp_path / "published")
    model, _ = load(ours(select), tmp_path / "published", "encoder")
    theirs = selected(naflex(original), select)
    assert_equal(model.encoder(pixels()), theirs)
    missing = [f"vision_model.head.{name}" for name in HEAD] if select == "patches" else []
    exported = send_back(model, "encoder", "siglip2", tmp_path / "published", *missing)
    assert_equal(selected(naflex(Siglip2VisionModel.from_pretrained(exported)), select), theirs)


@pytest.mark.parametrize("size", [SIZE - PATCH, SIZE + 2 * PATCH])
def test_siglip2_encoder_with_resampled_positions_gives_the_original_features(size: int, tmp_path: Path) -> None:
    settings = Siglip2VisionConfig(**TOWER, patch_size=PATCH, num_patches=SIDE**2)
    original = publish(Siglip2VisionModel(settings), tmp_path / "published")
    model, report = load(ours("patches", size), tmp_path / "published", "encoder")
    assert_equal(model.encoder(pixels(size=size)), selected(naflex(original, size), "patches"))
    assert report.parts[0].resampled == (f"encoder.position from {SIDE**2} rows",)

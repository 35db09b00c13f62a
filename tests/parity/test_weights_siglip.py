"""SigLIP's eye and SigLIP 2's from transformers: the same features, pooled or not, and back again."""

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
    """SigLIP 2 takes patches, unrolled row by row, and how many there are each way."""
    side = size // PATCH
    squares = pixels(size=size).unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 4, 5, 1)
    patches = squares.reshape(2, side * side, -1)
    mask = torch.ones(2, side * side, dtype=torch.long)
    return model(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=torch.tensor([[side, side]] * 2))


@pytest.mark.parametrize("select", ["patches", "attention"])
def test_siglip_features_are_the_originals_and_go_back(select: str, tmp_path: Path) -> None:
    original = publish(SiglipVisionModel(SiglipVisionConfig(**VISION)), tmp_path / "published")
    model, _ = load(ours(select), tmp_path / "published", "encoder")
    theirs = selected(original(pixels()), select)
    assert_equal(model.encoder(pixels()), theirs)
    missing = [f"vision_model.head.{name}" for name in HEAD] if select == "patches" else []
    exported = send_back(model, "encoder", "siglip", tmp_path / "published", *missing)
    assert_equal(selected(SiglipVisionModel.from_pretrained(exported)(pixels()), select), theirs)


def test_siglip_whole_leaves_its_text_tower_behind(tmp_path: Path) -> None:
    original = publish(SiglipModel(SiglipConfig(text_config=TOWER, vision_config=VISION)), tmp_path / "published")
    model, report = load(ours("attention"), tmp_path / "published", "encoder")
    assert_equal(model.encoder(pixels()), selected(original.vision_model(pixels()), "attention"))
    assert set(report.parts[0].dropped) == {"the text tower", "a weight of the contrastive loss"}


@pytest.mark.parametrize("select", ["patches", "attention"])
def test_siglip2_features_are_the_originals_and_go_back(select: str, tmp_path: Path) -> None:
    settings = Siglip2VisionConfig(**TOWER, patch_size=PATCH, num_patches=SIDE**2)
    original = publish(Siglip2VisionModel(settings), tmp_path / "published")
    model, _ = load(ours(select), tmp_path / "published", "encoder")
    theirs = selected(naflex(original), select)
    assert_equal(model.encoder(pixels()), theirs)
    missing = [f"vision_model.head.{name}" for name in HEAD] if select == "patches" else []
    exported = send_back(model, "encoder", "siglip2", tmp_path / "published", *missing)
    assert_equal(selected(naflex(Siglip2VisionModel.from_pretrained(exported)), select), theirs)


@pytest.mark.parametrize("size", [SIZE - PATCH, SIZE + 2 * PATCH])
def test_siglip2_at_another_resolution_sees_what_the_original_sees(size: int, tmp_path: Path) -> None:
    settings = Siglip2VisionConfig(**TOWER, patch_size=PATCH, num_patches=SIDE**2)
    original = publish(Siglip2VisionModel(settings), tmp_path / "published")
    model, report = load(ours("patches", size), tmp_path / "published", "encoder")
    assert_equal(model.encoder(pixels(size=size)), selected(naflex(original, size), "patches"))
    assert report.parts[0].resampled == (f"encoder.position from {SIDE**2} rows",)

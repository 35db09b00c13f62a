"""Tests that an export describes the preprocessing of pictures and the generation settings of the exported model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from published_folders import publish_folder
from timm.data import create_transform, resolve_data_config
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor

import vlm
from vlm.config import ImageConfig, ModelConfig
from vlm.image import to_pixels
from vlm.weights.export import ExportReport, export_weights
from vlm.weights.family import Part

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
STRETCH = {"resize": "stretch", "filter": "bilinear", "mean": MEAN, "std": STD}
CROP = {**STRETCH, "resize": "crop", "filter": "bicubic"}


def export(
    root: Path, name: str, part: Part, image: dict[str, Any], **generation: Any
) -> tuple[ModelConfig, Path, ExportReport]:
    """Export a tiny model with the given settings, and return its config, the written folder and the report."""
    publish_folder(root, name)
    path = root / "checkpoint" / "config.json"
    values = json.loads(path.read_text())
    config = ModelConfig.model_validate(
        values | {"image": values["image"] | image, "generation": values["generation"] | generation}
    )
    path.write_text(config.model_dump_json())
    return config, root / "exported", export_weights(root / "checkpoint", part, name, root / "exported")


def picture() -> Image.Image:
    """Return a picture of 61 x 40 pixels, for which each resize and each filter gives different pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 61, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def ours(config: ImageConfig) -> Tensor:
    """Return the normalised pixels (3, size, size) that our model reads."""
    pixels = torch.from_numpy(to_pixels(picture(), config)).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(config.mean)[:, None, None]) / torch.tensor(config.std)[:, None, None]


@pytest.mark.parametrize("image", [STRETCH, CROP], ids=["stretch", "crop"])
@pytest.mark.parametrize(
    "generation",
    [
        {"max_new_tokens": 7, "num_beams": 3, "length_penalty": 0.5, "repetition_penalty": 1.5},
        {"temperature": 0.7, "top_k": 4, "top_p": 0.8, "min_p": 0.1, "stop": ["a", "b"]},
        {"temperature": 1.3},
    ],
    ids=["beams", "sampling", "no limits"],
)
def test_a_loaded_export_has_the_picture_and_generation_settings_of_the_model(
    image: dict[str, Any], generation: dict[str, Any], tmp_path: Path
) -> None:
    config, folder, _ = export(tmp_path, "paligemma", "model", image, **generation)
    loaded = vlm.load(folder, device="cpu").model.config
    assert loaded.image == config.image
    assert loaded.generation == config.generation
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == "PaliGemmaProcessor"
    assert processor.image_seq_length == config.num_slots


@pytest.mark.parametrize("image", [STRETCH, CROP], ids=["stretch", "crop"])
@pytest.mark.parametrize("name", ["clip", "vit", "siglip", "paligemma"])
def test_transformers_preprocesses_pictures_like_the_exported_model(
    name: str, image: dict[str, Any], tmp_path: Path
) -> None:
    config, folder, report = export(tmp_path, name, "model" if name == "paligemma" else "encoder", image)
    processor = AutoImageProcessor.from_pretrained(folder)
    theirs = processor(picture(), return_tensors="pt")["pixel_values"][0].float()
    assert theirs.shape == ours(config.image).shape
    assert float((theirs - ours(config.image)).abs().max()) < 0.03
    assert report.unwritten == {}


@pytest.mark.parametrize("image", [STRETCH, {**CROP, "crop_start": "even"}], ids=["stretch", "crop"])
def test_timm_preprocesses_pictures_like_the_exported_encoder(image: dict[str, Any], tmp_path: Path) -> None:
    config, folder, report = export(tmp_path, "timm", "encoder", image)
    settings = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    transform = create_transform(**resolve_data_config(pretrained_cfg=settings))
    assert torch.allclose(transform(picture()), ours(config.image), atol=1e-5)
    assert report.unwritten == {}


@pytest.mark.parametrize(
    ("name", "image", "unwritten"),
    [
        ("vit", {"resize": "pad"}, "image.resize"),
        ("timm", {"resize": "pad"}, "image.resize"),
        ("clip", {**CROP, "crop_start": "even"}, "image.crop_start"),
        ("timm", {**CROP, "crop_start": "down"}, "image.crop_start"),
        ("siglip2", STRETCH, "image.resize"),
    ],
)
def test_the_export_report_lists_settings_that_the_other_library_does_not_have(
    name: str, image: dict[str, Any], unwritten: str, tmp_path: Path
) -> None:
    _, folder, report = export(tmp_path, name, "encoder", image)
    assert [*report.unwritten.values()] == [(unwritten,)]
    described = (folder / "preprocessor_config.json").exists()
    assert described == ("preprocessor_config.json" in report.files) == (name in ("clip", "siglip2"))


def test_the_export_report_says_that_the_seed_of_sampling_is_not_written(tmp_path: Path) -> None:
    _, _, report = export(tmp_path, "gpt2", "decoder", {}, temperature=0.5)
    assert [*report.unwritten.values()] == [("generation.seed",)]
    assert "generation_config.json" in report.files

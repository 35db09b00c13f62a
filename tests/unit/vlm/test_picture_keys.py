"""Tests of the keys that describe how a published model preprocesses pictures: an import applies each key, or names the
key in an error.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from published_tokenizers import byte_fallback
from tiny_published_models import blocks, config
from transformers import AutoImageProcessor

import vlm
from vlm.checkpoint import save_model
from vlm.config import ImageConfig, ModelConfig
from vlm.errors import CheckpointError
from vlm.factory import build_model
from vlm.text.published import PublishedTokenizer
from vlm.weights.export import export_weights
from vlm.weights.load import import_weights
from vlm.weights.picture_keys import PREPROCESSOR, PROCESSOR, PROCESSORS, PublishedPictures, read_pictures
from vlm.weights.tables import families

COMPLETE: dict[str, Any] = {
    "do_resize": True, "size": {"height": 16, "width": 16}, "resample": 3, "do_rescale": True,
    "rescale_factor": 0.00392156862745098, "do_normalize": True, "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5], "image_processor_type": "SiglipImageProcessor",
    "processor_class": "PaliGemmaProcessor", "image_seq_length": 16, "do_convert_rgb": None,
}  # fmt: skip
CLIP = {**COMPLETE, "image_processor_type": "CLIPImageProcessor", "do_center_crop": True, "image_seq_length": None}


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


SIZE = {"image_size": 16, "patch_size": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "clip": {"model_type": "clip_vision_model", **SIZE},
    "paligemma": {"model_type": "paligemma", "text_config": {"model_type": "gemma"}, "vision_config": SIZE},
    "siglip2": {"model_type": "siglip2", "vision_config": SIZE},
    "vit": {"model_type": "vit", **SIZE},
}
"""Dict from each family to the settings in config.json with which the preprocessing must agree."""


def read(folder: Path, name: str = "paligemma") -> PublishedPictures | None:
    family = next(each for each in families() if each.name == name)
    return read_pictures(folder, family, SETTINGS[name])


def image(folder: Path, name: str = "paligemma", **changes: Any) -> ImageConfig:
    """Change some keys of a complete preprocessor_config.json, and return the resulting image config."""
    write(folder, PREPROCESSOR, {**COMPLETE, **changes})
    pictures = read(folder, name)
    assert pictures is not None
    return ImageConfig(size=16, **pictures.values)


def theirs(folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    """Return the output (3, 16, 16) of transformers' image processor for a picture that has the model's size."""
    processor = AutoImageProcessor.from_pretrained(folder, use_fast=True)
    result: torch.Tensor = processor(pixels, return_tensors="pt")["pixel_values"][0].float()
    return result


FOLLOWED: list[dict[str, Any]] = [
    {},
    {"image_mean": [0.4, 0.5, 0.6]},
    {"image_std": [0.1, 0.2, 0.3]},
    {"rescale_factor": 1 / 127.5},
    {"rescale_factor": 0.5, "image_mean": [3.0, 4.0, 5.0]},
    {"do_rescale": False},
    {"do_normalize": False},
    {"do_normalize": False, "do_rescale": False},
    {"do_normalize": False, "image_mean": None, "image_std": None, "do_center_crop": None, "do_pad": None},
]


@pytest.mark.parametrize("changes", FOLLOWED)
def test_mean_and_std_give_the_same_numbers_as_the_image_processor_of_transformers(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    settings = image(tmp_path, **changes)
    pixels = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (settings.mean, settings.std))
    assert torch.allclose((pixels / 255 - mean) / std, theirs(tmp_path, pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("resample", "name"), [(1, "lanczos"), (2, "bilinear"), (3, "bicubic")])
def test_the_published_resize_filter_is_used(resample: int, name: str, tmp_path: Path) -> None:
    assert image(tmp_path, resample=resample).filter == name


REFUSED: list[tuple[str, Any]] = [
    ("do_resize", False), ("size", {"height": 32, "width": 32}), ("size", {"height": 16, "width": 24}), ("size", 16),
    ("size", {"shortest_edge": 16}), ("size", {"longest_edge": 16}), ("resample", 0), ("resample", 5),
    ("resample", "bilinear"), ("resample", [3]), ("do_rescale", "no"), ("rescale_factor", 0), ("rescale_factor", "1"),
    ("resample", None), ("size", None), ("do_rescale", None), ("rescale_factor", None), ("image_mean", None),
    ("do_normalize", "no"), ("image_mean", 0.5), ("image_mean", [0.5]), ("image_mean", ["a", "b", "c"]),
    ("image_std", [0, 0, 0]), ("image_std", [0.5, 0.5, 0]), ("image_std", 1.0), ("do_center_crop", "no"),
    ("do_pad", True), ("do_convert_rgb", False), ("data_format", "channels_last"), ("image_seq_length", 9),
    ("image_processor_type", "BitImageProcessor"), ("unknown_key", 1), ("do_thumbnail", True), ("crop_pct", 0.9),
    ("do_flip_channel_order", True), ("auto_map", {"AutoImageProcessor": "code.py"}),
]  # fmt: skip


@pytest.mark.parametrize("in_section", [False, True])
@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_a_preprocessing_that_lakesight_does_not_have_is_refused_and_the_error_names_file_and_key(
    key: str, value: Any, in_section: bool, tmp_path: Path
) -> None:
    changed = {**COMPLETE, key: value}
    name = PROCESSOR if in_section else PREPROCESSOR
    write(tmp_path, name, {"image_processor": changed} if in_section else changed)
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path)
    assert any(key in line and name in line for line in caught.value.problems), caught.value.problems


def test_a_default_of_transformers_that_lakesight_does_not_have_is_refused(tmp_path: Path) -> None:
    write(tmp_path, PREPROCESSOR, {key: value for key, value in COMPLETE.items() if key != "size"})
    with pytest.raises(CheckpointError, match=r"size is missing in preprocessor_config\.json"):
        read(tmp_path)
    with pytest.raises(CheckpointError, match=r"size in preprocessor_config\.json"):
        image(tmp_path, image_processor_type="CLIPImageProcessor")  # this class crops to 224 pixels


def test_every_key_of_a_file_is_reported_as_used_or_as_without_effect(tmp_path: Path) -> None:
    write(tmp_path, PREPROCESSOR, {**COMPLETE, "crop_size": 7, "pad_size": 3})
    pictures = read(tmp_path)
    assert pictures is not None
    (report,) = pictures.reports
    without_effect = {key for keys in report.without_effect.values() for key in keys}
    assert without_effect == {"processor_class", "crop_size", "pad_size"}
    assert {*report.used} == {*COMPLETE} - {"processor_class", "do_convert_rgb"}


def test_the_section_image_processor_replaces_the_file_preprocessor_config_as_in_transformers(tmp_path: Path) -> None:
    write(tmp_path, PREPROCESSOR, {**COMPLETE, "image_mean": [0.1, 0.1, 0.1]})
    for section, mean in (({**COMPLETE, "image_mean": [0.3] * 3}, 0.3), (None, 0.1)):
        write(tmp_path, PROCESSOR, {"image_processor": section, "processor_class": "PaliGemmaProcessor"})
        pictures = read(tmp_path)
        assert pictures is not None
        assert pictures.values["mean"] == (mean,) * 3
        assert AutoImageProcessor.from_pretrained(tmp_path).image_mean[0] == mean
    for key, value in (("image_seq_length", 9), ("unknown_key", 1), ("image_processor", "x")):
        write(tmp_path, PROCESSOR, {key: value})
        with pytest.raises(CheckpointError, match=rf"{key} in processor_config\.json"):
            read(tmp_path)


def test_the_processors_of_encoders_stretch_or_crop_as_in_transformers(tmp_path: Path) -> None:
    square, shorter = {"height": 16, "width": 16}, {"shortest_edge": 16}
    for size, crop_size, resize in ((shorter, square, "crop"), (16, 16, "crop"), (square, square, "stretch")):
        changes = {**CLIP, "size": size, "crop_size": crop_size}
        assert image(tmp_path, "clip", **changes).resize == resize
    with pytest.raises(CheckpointError, match="size in preprocessor_config"):
        image(tmp_path, "clip", **{**CLIP, "size": shorter, "crop_size": 12})
    vit = {"image_processor_type": "ViTFeatureExtractor", "image_seq_length": None}
    assert image(tmp_path, "vit", **vit, size=16).resize == "stretch"
    any_shape = {"image_processor_type": "Siglip2ImageProcessorFast", "max_num_patches": 256, "patch_size": 16}
    assert image(tmp_path, "siglip2", **any_shape).resize == "stretch"


def test_the_assumed_defaults_of_missing_keys_equal_the_defaults_of_transformers() -> None:
    import transformers

    for name, defaults in PROCESSORS.items():
        kind = getattr(transformers, name)
        for key, value in defaults.items():
            if name == "Siglip2ImageProcessor" and key in ("size", "default_to_square"):
                continue
            assert getattr(kind, key, None) == value or (value is False and not getattr(kind, key, None)), (name, key)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a whole published model, without a description of the preprocessing."""
    backend = byte_fallback()
    size = backend.get_vocab_size()
    text = {"kind": "json", "vocab_size": size, "bos": "<bos>", "eos": "<eos>", "pad": "<pad>"}
    attention = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    mlp = {"kind": "gated", "mlp_width": 24, "activation": "gelu_tanh"}
    norm = {"kind": "rms", "eps": 1e-6, "offset": True}
    transformer = blocks(attention=attention, mlp=mlp, norm=norm, position={"kind": "rotary"})
    whole = config(
        {"transformer": blocks(activation="gelu_tanh", eps=1e-6)},
        {"context": 99, "transformer": transformer, "tie_embeddings": True, "scale_embeddings": True},
        mask={"kind": "prefix"},
        projector={"kind": "linear"},
    )
    settings = ModelConfig.model_validate(whole.model_dump() | {"text": text})
    assert settings.text.kind == "json"
    tokenizer = PublishedTokenizer(json.loads(backend.to_str()), settings.text)
    save_model(tmp_path / "checkpoint", build_model(settings, tokenizer.vocab_size), tokenizer)
    export_weights(tmp_path / "checkpoint", "model", "paligemma", tmp_path / "published")
    return tmp_path / "published"


def test_load_uses_the_published_preprocessing_and_import_compares_it_with_the_model(folder: Path) -> None:
    write(folder, PREPROCESSOR, {**COMPLETE, "image_mean": [0.4] * 3, "resample": 2, "rescale_factor": 1 / 127.5})
    captioner = vlm.load(folder, device="cpu")
    model, vocab_size = captioner.model.config, captioner.tokenizer.vocab_size
    assert model.image.filter == "bilinear"
    assert model.image.mean[0] == pytest.approx(0.2)
    _, report = import_weights(model, vocab_size, {"model": folder})
    (pictures,) = (file for file in report.parts[0].files if file.file == PREPROCESSOR)
    assert {"image_mean", "resample", "size"} <= {*pictures.used}
    own = model.model_copy(update={"image": ImageConfig(size=16)})
    with pytest.raises(CheckpointError) as caught:
        import_weights(own, vocab_size, {"model": folder})
    assert len(caught.value.problems) == 3
    for line, key in zip(caught.value.problems, ("image_mean", "image_std", "resample"), strict=True):
        assert f"{key}" in line
        assert PREPROCESSOR in line


def test_a_folder_of_a_family_with_unknown_preprocessing_is_refused_if_it_describes_the_preprocessing(
    tmp_path: Path,
) -> None:
    (clip,) = (each for each in families() if each.name == "clip")
    new = replace(clip, name="new", image_processor="")
    assert read_pictures(tmp_path, new, SETTINGS["clip"]) is None
    write(tmp_path, PREPROCESSOR, {"image_mean": [0.1, 0.2, 0.3]})
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json describes .* does not know for new"):
        read_pictures(tmp_path, new, SETTINGS["clip"])
    (timm,) = (each for each in families() if each.name == "timm")
    assert read_pictures(tmp_path, timm, {"architecture": "vit_tiny_patch16_224"}) is None


def test_an_import_and_the_function_load_say_that_a_folder_does_not_describe_the_preprocessing(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / PREPROCESSOR).unlink(missing_ok=True)
    captioner = vlm.load(folder, device="cpu")
    assert "has no preprocessor_config.json, so pictures are preprocessed with the default settings" in caplog.text
    model, vocab_size = captioner.model.config, captioner.tokenizer.vocab_size
    _, report = import_weights(model, vocab_size, {"model": folder})
    assert report.parts[0].unchecked == ("image, because the folder has no preprocessor_config.json",)
    write(folder, PREPROCESSOR, COMPLETE)
    _, report = import_weights(model, vocab_size, {"model": folder})
    assert report.parts[0].unchecked == ()

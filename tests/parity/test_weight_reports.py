"""Tests of situations from public bug reports about the conversion of published weights.

The report `timm 2031` is GitHub issue or pull request 2031 of the project timm (pytorch-image-models).

| report | situation | what went wrong there |
|---|---|---|
| llama.cpp 1473, exllamav2 30, tinygrad 3310 | weights in bf16 or fp16 | exception |
| candle 2875, mlx-examples 1232 | weights in fp8 | exception without the reason |
| CTranslate2 1415, 1618; transformers 12763 | a tokenizer with more tokens than embedding rows | index out of range |
| transformers 4875, ReconVLA 7 | more embedding rows than tokens | exception |
| timm 2031, open_clip 915, mindone 225 | CLIP with quick_gelu, loaded as gelu | other features |
| TinyCLIP 4, open_clip 591 | a folder in the format of open_clip | names that do not match |
| timm 2317, dinov2 506, dino 8 | positions for a picture that is not square | wrong grid |
| vision_transformer 317 | 14 x 14 positions without a class token | taken for a class token and 195 positions |
| peft 2018, transformers 45127 | a tied head whose tensor differs from the embeddings | head overwritten |
| peft 2405, transformers 28689 | a weight file that is truncated or is not safetensors | exception of the parser |
| peft 1689 | a folder that contains only an adapter | loaded as a model |
| transformers 18639 | layer norms with another epsilon | other outputs |
| vllm 52667, paligemma 13, openpi 769 | scale of picture features and text embeddings | scaled twice |
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published_folders import MODELS, family_of, loaders, publish_folder, weights_of
from safetensors.torch import load_file, save_file
from torch import Tensor

import vlm
from vlm.config import ModelConfig
from vlm.errors import CheckpointError, ConfigError, LakesightError
from vlm.model import VisionLanguageModel

Published = tuple[Path, ModelConfig]


def load_all(published: Published, name: str, **changes: Any) -> list[VisionLanguageModel]:
    """Load a folder with each function that can load the folder. The import gets a model config with `changes`."""
    folder, config = published
    changed = ModelConfig.model_validate(config.model_dump() | changes)
    return [load() for load in loaders(folder, family_of(name).part, changed)]


def edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(edit(load_file(folder / "model.safetensors")), folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["paligemma", "clip", "gpt2"])
def test_weights_in_16_bits_are_loaded_as_the_same_values(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    published, part = publish_folder(tmp_path, name), family_of(name).part
    before = weights_of(load_all(published, name)[0])
    edit_tensors(published[0], lambda tensors: {key: tensor.to(dtype) for key, tensor in tensors.items()})
    for model in load_all(published, name):
        filled = [key for key in before if part in ("model", key.partition(".")[0])]
        assert filled
        for key in filled:
            tensor = weights_of(model)[key]
            assert torch.equal(tensor, before[key].to(dtype).float()), key


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.bool], ids=str)
def test_weights_in_a_format_that_is_not_supported_are_refused_with_the_name_of_the_format(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    published = publish_folder(tmp_path, "paligemma")
    edit_tensors(published[0], lambda tensors: {key: tensor.to(dtype) for key, tensor in tensors.items()})
    for load in loaders(published[0], "model", published[1]):
        with pytest.raises(CheckpointError, match=r"has type (F8_E4M3|I8|U8|BOOL), expected one of"):
            load()


def test_a_tokenizer_with_more_tokens_than_embedding_rows_is_refused_and_padded_rows_are_accepted(
    tmp_path: Path,
) -> None:
    folder, _ = publish_folder(tmp_path, "paligemma")
    added = {"content": "<sep>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}

    def add(content: dict[str, Any]) -> None:
        content["added_tokens"].append({"id": 291, "special": True, **added})

    edit_json(folder / "tokenizer.json", add)
    with pytest.raises(ConfigError, match="the tokenizer has 292 tokens, more than vocab_size 291"):
        vlm.load(folder, device="cpu")
    edit_json(folder / "tokenizer.json", lambda content: content["added_tokens"].pop())
    edit_json(folder / "config.json", lambda content: content["text_config"].update(vocab_size=300))
    table = "language_model.model.embed_tokens.weight"
    edit_tensors(folder, lambda tensors: {**tensors, table: torch.cat([tensors[table], tensors[table][:9]])})
    assert vlm.load(folder, device="cpu").tokenizer.vocab_size == 300


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("clip", {"hidden_act": "gelu"}, "activation: .*hidden_act in config.json gives 'gelu'"),
        ("clip", {"layer_norm_eps": 1e-6}, "norm.eps: .*layer_norm_eps in config.json gives 1e-06"),
        ("vit", {"image_size": [16, 32]}, "image_size"),
        ("siglip", {"image_size": [16, 32]}, "image_size"),
    ],
)
def test_settings_that_change_the_features_are_refused_by_name(
    name: str, change: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    published = publish_folder(tmp_path, name)

    def edit(content: dict[str, Any]) -> None:
        (content.get("vision_config") or content).update(change)

    edit_json(published[0] / "config.json", edit)
    with pytest.raises(CheckpointError, match=expected):
        load_all(published, name)


def test_a_folder_of_open_clip_or_of_an_adapter_is_refused_and_the_error_says_which_files_are_needed(
    tmp_path: Path,
) -> None:
    tensor = {"visual.conv1.weight": torch.zeros(4, 3, 4, 4)}
    files = {
        "open_clip": ("open_clip_config.json", {"model_cfg": {"embed_dim": 4}}, "open_clip_model.safetensors"),
        "adapter": ("adapter_config.json", {"peft_type": "LORA"}, "adapter_model.safetensors"),
    }
    for name, (config, content, weights) in files.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / config).write_text(json.dumps(content))
        save_file(tensor, folder / weights)
        loads = [lambda: vlm.load(folder), *loaders(folder, "encoder", MODELS["clip"])]  # noqa: B023
        for load in loads:
            with pytest.raises(LakesightError, match=r"config\.json.*config\.json and model\.safetensors"):
                load()


@pytest.mark.parametrize("side", [14, 3])
def test_positions_without_a_class_token_are_resampled_as_a_square_grid(side: int, tmp_path: Path) -> None:
    published = publish_folder(tmp_path, "siglip")
    table = "vision_model.embeddings.position_embedding.weight"
    rows = torch.arange(float(side)).repeat_interleave(side)[:, None].expand(-1, 16).contiguous()

    def replace(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert table in tensors
        return {**tensors, table: rows}

    edit_tensors(published[0], replace)

    def edit(content: dict[str, Any]) -> None:
        (content.get("vision_config") or content).update(image_size=4 * side)

    edit_json(published[0] / "config.json", edit)
    size = {"height": 4 * side, "width": 4 * side}
    edit_json(published[0] / "preprocessor_config.json", lambda content: content.update(size=size))
    (model,) = load_all(published, "siglip")
    grid = weights_of(model)["encoder.position"].reshape(4, 4, 16)
    assert torch.allclose(grid, grid[:, :1].expand_as(grid), atol=1e-5)
    assert bool((grid[1:, 0, 0] > grid[:-1, 0, 0]).all())


def test_a_separate_head_of_a_model_with_tied_embeddings_is_refused(tmp_path: Path) -> None:
    published = publish_folder(tmp_path, "gemma")
    table = next(key for key in load_file(published[0] / "model.safetensors") if "embed_tokens" in key)
    edit_tensors(published[0], lambda tensors: {**tensors, "lm_head.weight": tensors[table] + 1})
    with pytest.raises(CheckpointError, match="a separate output head, but the model ties the head"):
        load_all(published, "gemma")


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 64, b"{}", b"<!DOCTYPE html>", "half"], ids=repr)
def test_a_weight_file_that_is_no_whole_safetensors_file_is_refused_with_its_path(
    content: bytes | str, tmp_path: Path
) -> None:
    folder, config = publish_folder(tmp_path, "paligemma")
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(content if isinstance(content, bytes) else data[: len(data) // 2])
    for load in loaders(folder, "model", config):
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            load()

"""Importing weights that do not fit the model raises an error before any tensor is read. If tensors do not match in
name, shape or type, the error lists all of these tensors.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_published_models import blocks, config, load
from torch import Tensor

from vlm.checkpoint import save_model
from vlm.errors import CheckpointError
from vlm.text.chars import CharTokenizer
from vlm.weights.export import export_weights
from vlm.weights.family import Part
from vlm.weights.load import import_weights

OURS = config(decoder={"transformer": blocks(activation="gelu_tanh"), "tie_embeddings": True})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a GPT-2 model in the format in which transformers publishes models."""
    model, _ = import_weights(OURS, 40, {})
    save_model(tmp_path / "checkpoint", model, CharTokenizer("ab"))
    export_weights(tmp_path / "checkpoint", "decoder", "gpt2", tmp_path / "gpt2")
    return tmp_path / "gpt2"


def refused(folder: Path, part: Part = "decoder") -> str:
    """Run a weight import that must fail, and return the error message after checking its four parts."""
    with pytest.raises(CheckpointError) as caught:
        load(OURS, folder, part)
    error = caught.value
    assert all((error.what, error.where, error.got, error.fix)), str(error)
    return str(error)


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(edit(tensors), folder / "model.safetensors")


def test_import_error_lists_all_mismatches_with_the_nearest_tensor_names(folder: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for layer in range(3):
            tensors[f"transformer.h.{layer}.ln1.weight"] = tensors.pop(f"transformer.h.{layer}.ln_1.weight")
        del tensors["transformer.ln_f.bias"]
        tensors["transformer.wpe.weight"] = torch.zeros(50, 16)
        tensors["transformer.h.1.mlp.c_fc.bias"] = tensors["transformer.h.1.mlp.c_fc.bias"].to(torch.int8)
        return tensors

    edit_tensors(folder, damage)
    message = refused(folder)
    for sentence in (
        "missing in the file: transformer.h.{0..2}.ln_1.weight (nearest: transformer.h.{0..2}.ln1.weight)",
        "unused in the file: transformer.h.{0..2}.ln1.weight (nearest: transformer.h.{0..2}.ln_1.weight)",
        "missing in the file: transformer.ln_f.bias",
        "n_positions in config.json is 48, but transformer.wpe.weight in the weight files has shape (50, 16)",
        "transformer.wpe.weight has shape (50, 16), the model needs (48, 16)",
        "transformer.h.1.mlp.c_fc.bias has type I8",
    ):
        assert sentence in message


def test_the_import_error_names_a_parameter_that_weights_of_this_family_never_contain(folder: Path) -> None:
    pooled = config(vision={"select": "attention", "post_norm": True, "class_token": True})
    vit = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4}
    (folder / "config.json").write_text(json.dumps({**vit, "intermediate_size": 24, "layer_norm_eps": 1e-5}))
    with pytest.raises(CheckpointError) as caught:
        load(pooled, folder, "encoder")
    assert "parameter without a tensor in the file: encoder.pool.query" in str(caught.value)


def test_import_refuses_decoder_weights_for_the_encoder(folder: Path) -> None:
    message = refused(folder, "encoder")
    assert "model_type in config.json is 'gpt2', which is a family for the decoder" in message
    encoders = "clip, siglip, siglip2, timm, timm_branches, timm_eva, timm_parallel, timm_relative, timm_rope, vit"
    assert f"families for the encoder: {encoders}" in message


def test_weights_of_an_unknown_model_family_are_refused_with_a_list_of_the_known_families(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    assert (
        "model_type in config.json is 'mamba'. Fix: choose weights of one of the families for the decoder: "
        "gemma, gemma2, gpt2" in refused(folder)
    )


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_import_refuses_a_truncated_weight_file(size: int, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert "truncated, damaged or not safetensors" in refused(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "model.pth"])
def test_import_refuses_a_pickle_file_without_loading_the_file(name: str, folder: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
            return pytest.fail, ()

    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Trap()))
    message = refused(folder)
    assert "loading a pickle can run any code that it contains" in message
    assert name in message


def test_import_refuses_a_folder_without_weights_or_config(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has no weights" in refused(folder)
    (folder / "config.json").write_text("[1]")
    assert "not a JSON object" in refused(folder)
    (folder / "config.json").write_text("{")
    assert "config of the weights cannot be read" in refused(folder)
    assert "config of the weights cannot be read" in refused(tmp_path / "nowhere")


def test_import_error_names_missing_shards(folder: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    report = export_weights(tmp_path / "checkpoint", "decoder", "gpt2", shards, max_bytes=4000)
    names = [name for name in report.files if name.endswith(".safetensors")]
    assert len(names) > 3
    model, _ = load(OURS, shards, "decoder")
    whole, _ = load(OURS, folder, "decoder")
    assert all(torch.equal(one, other) for one, other in zip(*map(weights, (model, whole)), strict=True))
    (shards / names[1]).unlink()
    assert f"1 of {len(names)}: {names[1]}" in refused(shards)
    index = shards / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"wte": "../model.safetensors"}}')
    assert "lists files outside its folder. Where: " + str(index) + ". Got: ../model.safetensors" in refused(shards)
    index.write_text("{}")
    assert "index of the weight files cannot be read" in refused(shards)


def test_weights_of_lower_precision_are_converted_to_the_data_type_of_the_model(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    model, _ = load(OURS, folder, "decoder")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def without_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


def test_weights_are_imported_if_a_tied_tensor_is_stored_under_one_of_its_names_or_under_both(folder: Path) -> None:
    edit_tensors(folder, without_head)
    expected, _ = load(OURS, folder, "decoder")

    def rename_embedding(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {"lm_head.weight": tensors.pop("transformer.wte.weight")}

    edit_tensors(folder, rename_embedding)
    model, report = load(OURS, folder, "decoder")
    assert report.parts[0].tied == ("lm_head.weight",)
    assert all(torch.equal(one, other) for one, other in zip(*map(weights, (model, expected)), strict=True))
    edit_tensors(folder, lambda tensors: tensors | {"transformer.wte.weight": tensors["lm_head.weight"].clone()})
    assert load(OURS, folder, "decoder")[1].parts[0].tied == ("lm_head.weight",)
    edit_tensors(folder, lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1})
    assert "lm_head.weight differs from transformer.wte.weight" in refused(folder)


def test_a_leftover_shard_index_beside_an_unsharded_weight_file_is_ignored_and_reported(folder: Path) -> None:
    expected, _ = load(OURS, folder, "decoder")
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"transformer.wte.weight": "model-00001-of-00002.safetensors"}}')
    model, report = load(OURS, folder, "decoder")
    assert report.parts[0].ignored == (index.name,)
    assert all(torch.equal(one, other) for one, other in zip(*map(weights, (model, expected)), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_import_refuses_weights_that_are_not_finite_and_names_the_tensor(value: float, folder: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["transformer.h.1.ln_1.bias"][3] = value
        return tensors

    edit_tensors(folder, damage)
    message = refused(folder)
    assert "the weights contain NaN or infinity. Where: transformer.h.1.ln_1.bias in " in message
    assert "1 of 16 values are not finite" in message


def weights(model: torch.nn.Module) -> list[Tensor]:
    return [parameter for name, parameter in model.named_parameters() if name.startswith("decoder.")]


def test_export_refuses_a_model_that_the_published_format_cannot_represent(tmp_path: Path) -> None:
    windowed = OURS.model_dump()
    windowed["decoder"]["transformer"]["attention"]["windows"] = [8]
    model, _ = import_weights(type(OURS).model_validate(windowed), 40, {})
    save_model(tmp_path / "checkpoint", model, CharTokenizer("ab"))
    with pytest.raises(CheckpointError, match=r"gpt2 cannot represent this decoder.*windows"):
        export_weights(tmp_path / "checkpoint", "decoder", "gpt2", tmp_path / "out")
    with pytest.raises(CheckpointError, match="one of gemma, gemma2, gpt2"):
        export_weights(tmp_path / "checkpoint", "decoder", "gtp2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_refuses_a_parameter_for_which_the_published_format_has_no_tensor(tmp_path: Path) -> None:
    pooled = config(vision={"class_token": True, "select": "attention"})
    model, _ = import_weights(pooled, 40, {})
    save_model(tmp_path / "checkpoint", model, CharTokenizer("ab"))
    with pytest.raises(CheckpointError, match=r"no tensor for some parameters of this encoder.*encoder\.pool\.query"):
        export_weights(tmp_path / "checkpoint", "encoder", "vit", tmp_path / "out")

"""Tests of models whose weights stay in a memory-mapped file: no copies, equal outputs, and refused files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VARIANTS, tiny_batch, tiny_model, wide_model
from torch import nn

from vlm.checkpoint import WEIGHTS, load_model, map_model, save_converted, save_model, stored_precision
from vlm.config import Precision
from vlm.errors import CheckpointError
from vlm.model import VisionLanguageModel
from vlm.precision import set_precision, split_weight
from vlm.text.base import Tokenizer

TEXTS = [("", "red car"), ("", "blue bus"), ("", "old iphone")]
needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs the memory map of a process")


def plain_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and values of the plain tensors in which all weights of a model are stored."""
    for name, weight in model.named_parameters():
        yield from split_weight(name, weight.detach()).items()


def mapped_ranges(path: Path) -> list[range]:
    """Return the address ranges at which this process has mapped a file."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = [re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line) for line in lines if line.endswith(str(path))]
    return [range(int(each[1], 16), int(each[2], 16)) for each in found if each]


def build(variant: str) -> tuple[VisionLanguageModel, Tokenizer]:
    return wide_model() if variant == "wide" else tiny_model(variant)


def write(variant: str, precision: Precision, folder: Path) -> Path:
    """Write a model and, for a precision other than fp32, its converted weights. Return the folder to map."""
    model, tokenizer = build(variant)
    save_model(folder / "model", model, tokenizer)
    if precision is Precision.FP32:
        return folder / "model"
    set_precision(model, precision)
    save_converted(folder / "converted", model, tokenizer, precision)
    return folder / "converted"


CASES = [(variant, precision) for variant in VARIANTS for precision in ("fp32", "bf16", "int8")]


@pytest.mark.parametrize(("variant", "precision"), [*CASES, ("wide", "fp16"), ("wide", "int4")])
@torch.inference_mode()
def test_a_mapped_model_computes_the_same_bits_as_a_loaded_model(variant: str, precision: str, tmp_path: Path) -> None:
    kind = Precision(precision)
    mapped, tokenizer = map_model(write(variant, kind, tmp_path), kind)
    loaded, _ = load_model(tmp_path / "model")
    set_precision(loaded, kind)
    expected = dict(plain_weights(loaded))
    for name, tensor in plain_weights(mapped):
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected.pop(name)), name
    assert expected == {}
    batch = tiny_batch(loaded, tokenizer, TEXTS)
    assert torch.equal(mapped(batch), loaded(batch))
    assert not mapped.training


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs the memory map of a process (Linux)")
@pytest.mark.parametrize("precision", Precision)
def test_every_weight_of_a_mapped_model_lies_in_the_mapped_file(precision: Precision, tmp_path: Path) -> None:
    folder = write("wide", precision, tmp_path)
    model, _ = map_model(folder, precision)
    ranges = mapped_ranges(folder / WEIGHTS)
    outside = [name for name, tensor in plain_weights(model) if not any(tensor.data_ptr() in each for each in ranges)]
    assert outside == []


def test_a_mapped_model_keeps_its_tied_weight_in_one_parameter(tmp_path: Path) -> None:
    model, _ = map_model(write("other", Precision.FP32, tmp_path))
    assert model.decoder.head.weight is model.decoder.tokens.weight


def test_a_mapped_model_keeps_its_weights_if_another_model_is_saved_in_its_folder(tmp_path: Path) -> None:
    folder = write("plain", Precision.FP32, tmp_path)
    mapped, _ = map_model(folder)
    expected = {name: weight.clone() for name, weight in plain_weights(mapped)}
    other, tokenizer = tiny_model("plain", seed=2)
    save_model(folder, other, tokenizer)
    assert all(torch.equal(weight, expected[name]) for name, weight in plain_weights(mapped))
    replaced, _ = map_model(folder)
    assert not torch.equal(replaced.decoder.head.weight, mapped.decoder.head.weight)


def test_the_precision_of_a_file_follows_from_its_metadata_or_from_the_type_of_all_weights(tmp_path: Path) -> None:
    assert stored_precision(write("plain", Precision.INT8, tmp_path)) is Precision.INT8
    assert stored_precision(tmp_path / "model") is Precision.FP32
    path = tmp_path / "model" / WEIGHTS
    weights = load_file(path)
    first = next(iter(weights))
    save_file(weights | {first: weights[first].bfloat16()}, path)
    assert stored_precision(tmp_path / "model") is None


def test_a_file_whose_weights_have_another_type_or_name_is_not_mapped(tmp_path: Path) -> None:
    folder = write("wide", Precision.FP32, tmp_path)
    with pytest.raises(CheckpointError, match=r"do not match.*has type torch.float32, expected torch.bfloat16"):
        map_model(folder, Precision.BF16)
    with pytest.raises(CheckpointError, match=r"do not match.*missing .*weight:qdata"):
        map_model(folder, Precision.INT8)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cannot be read"):
        map_model(folder)


def test_loading_and_mapping_a_model_keep_the_random_state(tmp_path: Path) -> None:
    folder = write("parallel", Precision.FP32, tmp_path)
    state = torch.random.get_rng_state()
    load_model(folder)
    map_model(folder)
    assert torch.equal(torch.random.get_rng_state(), state)

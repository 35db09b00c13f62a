"""Tests that `vlm.load`, `vlm.build` and `Captioner.save` refuse wrong arguments, with errors that name the
argument."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import tiny_config, tiny_model

import vlm
from vlm.captioner import Captioner
from vlm.config import GenerationConfig
from vlm.errors import ArgumentError, CheckpointError, ConfigError

NANO = Path(__file__).parents[3] / "conf/model/nano_tiny.yml"
CAPTIONER = Captioner(*tiny_model("plain"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    CAPTIONER.save(folder)
    return folder


@pytest.mark.parametrize("path", [None, 3, b"model", "", [], CAPTIONER], ids=lambda value: type(value).__name__)
def test_a_path_of_a_wrong_type_is_refused_by_name(path: Any) -> None:
    with pytest.raises(ArgumentError, match="the argument `path` cannot be used"):
        vlm.load(path)
    with pytest.raises(ArgumentError, match="the argument `folder` cannot be used"):
        CAPTIONER.save(path)


def test_a_path_without_a_folder_is_refused_and_the_error_says_that_nothing_is_downloaded(
    checkpoint: Path,
) -> None:
    for path in ("google/paligemma-3b-pt-224", checkpoint / "config.json", "a\0b", "a" * 5000, "models:/scenes/1"):
        with pytest.raises(CheckpointError, match=r"no folder with a model at this path.* no model is downloaded"):
            vlm.load(path)
    with pytest.raises(ArgumentError, match="a file has this path"):
        CAPTIONER.save(checkpoint / "config.json")


@pytest.mark.parametrize("device", ["gpu", "", -1, True, 1.5, b"cpu", [], "cuda:99", "xla"], ids=str)
def test_a_device_that_this_machine_lacks_is_refused_and_the_error_lists_the_devices(
    device: Any, checkpoint: Path
) -> None:
    with pytest.raises(ArgumentError, match=r"the argument `device` cannot be used. .*devices of this machine: cpu"):
        vlm.load(checkpoint, device=device)


def test_a_device_may_be_an_object_of_torch(checkpoint: Path) -> None:
    assert vlm.load(checkpoint, device=torch.device("cpu")).model.mean.device.type == "cpu"


@pytest.mark.parametrize("precision", [torch.bfloat16, None, "BF16", 16, []], ids=str)
def test_an_unknown_precision_is_refused_and_the_error_lists_the_precisions(precision: Any, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such precision.* choose from: fp32, bf16, fp16, int8, int4"):
        vlm.load(checkpoint, precision=precision)


@pytest.mark.parametrize("config", [None, 3, [], b"x", GenerationConfig()], ids=lambda value: type(value).__name__)
def test_a_config_of_a_wrong_type_is_refused_by_name(config: Any) -> None:
    with pytest.raises(ArgumentError, match="the argument `config` cannot be used"):
        vlm.build(config)


def test_an_unknown_or_wrong_key_of_a_config_is_refused_with_the_nearest_valid_key_or_the_value() -> None:
    nano = yaml.safe_load(NANO.read_text())
    cases: list[tuple[dict[str, Any], str]] = [
        ({"visoin": {}}, "visoin: unknown key, did you mean 'vision'"),
        ({"decoder": {**nano["decoder"], "contxt": 3}}, "decoder.contxt: unknown key, did you mean 'context'"),
        ({"generation": {"temprature": 1}}, "generation.temprature: unknown key, did you mean 'temperature'"),
        ({"generation": {"top_p": 7}}, r"generation.top_p: .*\(got 7\)"),
        ({"decoder": {**nano["decoder"], "context": True}}, "context must be a number, not True"),
        ({"image": 5}, r"image: .*\(got 5\)"),
    ]
    for changes, expected in cases:
        with pytest.raises(ConfigError, match=expected):
            vlm.build({**nano, **changes})
    with pytest.raises(ConfigError, match="no such file or model"):
        vlm.build("a\0b")


@pytest.mark.parametrize("texts", [None, "a red square", b"a", 3, {"a": 1}, Path("a")], ids=str)
def test_texts_that_are_no_list_are_refused_by_name(texts: Any) -> None:
    with pytest.raises(ArgumentError, match=r"the argument `texts` cannot be used. .*a list of texts"):
        vlm.build(NANO, texts)


@pytest.mark.parametrize("text", [None, 3, b"a", ["a"], "\ud800"], ids=ascii)
def test_an_example_text_that_is_no_text_is_refused_with_its_index(text: Any) -> None:
    for texts in (["a", text], iter(["a", text])):
        with pytest.raises(ArgumentError, match=r"the argument `texts\[1\]` "):
            vlm.build(NANO, texts)


@pytest.mark.parametrize("seed", ["3", 1.5, None, True, math.nan, 2**70, -(2**63) - 1], ids=str)
def test_a_seed_that_is_no_whole_number_or_is_out_of_range_is_refused_by_name(seed: Any) -> None:
    with pytest.raises(ArgumentError, match=r"the argument `seed` cannot be used. .*a whole number from -"):
        vlm.build(tiny_config("plain"), seed=seed)

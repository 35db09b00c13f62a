"""The default number type and the default device of the process change no result of the library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_models import VARIANTS, tiny_config, tiny_model, tiny_pixels

import vlm
from vlm.captioner import Captioner
from vlm.factory import build_model

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0, "seed": 5},
    {"num_beams": 3},
    {"temperature": 0.8, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
)
PICTURES = [Image.fromarray(pixels.numpy()) for pixels in tiny_pixels(3)]


@pytest.fixture(params=["bfloat16", "float16", "float64", "meta"])
def default(request: pytest.FixtureRequest) -> Iterator[str]:
    """Change the default type, or the default device, of the process during a test."""
    yield request.param
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def set_default(name: str) -> None:
    if name == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(getattr(torch, name))


def results(captioner: Captioner) -> list[Any]:
    captions = [captioner.caption(PICTURES, max_new_tokens=6, **settings) for settings in SETTINGS]
    logprobs = captioner.logprobs(PICTURES, [""] * 3, ["abc"] * 3)
    return [captions, logprobs, captioner.attention(PICTURES[0], max_new_tokens=4).decoder_TLHN.tolist()]


@pytest.mark.parametrize("variant", ["plain", "other"])
def test_the_default_type_and_device_change_no_caption_logprob_beam_or_attention(
    variant: str, default: str, tmp_path: Path
) -> None:
    captioner = Captioner(*tiny_model(variant))
    captioner.save(tmp_path)
    expected = results(captioner)
    set_default(default)
    assert results(captioner) == expected
    assert results(vlm.load(tmp_path, device="cpu")) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_default_type_and_device_change_no_weight_of_a_new_model(variant: str, default: str) -> None:
    expected = vlm.build(tiny_config(variant), ["a b"]).model
    set_default(default)
    model = vlm.build(tiny_config(variant), ["a b"]).model
    for old, new in ((expected.parameters(), model.parameters()), (expected.buffers(), model.buffers())):
        for before, after in zip(old, new, strict=True):
            assert (after.dtype, after.device) == (before.dtype, before.device)
            assert torch.equal(before, after)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_that_is_built_on_the_meta_device_takes_no_memory(variant: str) -> None:
    with torch.device("meta"):
        model = build_model(tiny_config(variant), 40)
    assert {(parameter.device.type, parameter.dtype) for parameter in model.parameters()} == {("meta", torch.float32)}

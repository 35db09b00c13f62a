"""Tests of lower precision: outputs, size of weights, fp32 routers and rotary tables, and a missing library."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VARIANTS, tiny_batch, tiny_model, tiny_pixels, wide_model
from torch import Tensor, nn

import vlm
from vlm.checkpoint import save_model
from vlm.config import Precision
from vlm.errors import UserError
from vlm.factory import build_model
from vlm.generation.generate import Request, generate
from vlm.model import VisionLanguageModel
from vlm.precision import set_precision
from vlm.text.prompt import prefix_ids

TEXTS = [("", "red car"), ("", "blue bus"), ("", "old iphone")]


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def stored(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors in which a tensor subclass stores its data."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from stored(getattr(tensor, name))
    else:
        yield tensor


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP16, Precision.INT8])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_every_model_variant_computes_similar_logits_in_lower_precision(variant: str, precision: Precision) -> None:
    scaled, tokenizer = tiny_model(variant)  # tiny_model has large weights, which enlarge rounding errors
    model = build_model(scaled.config, tokenizer.vocab_size).eval()
    batch = tiny_batch(model, tokenizer, TEXTS)
    expected = model(batch)
    set_precision(model, precision)
    logits = model(batch)
    assert logits.dtype == (torch.float16 if precision is Precision.FP16 else torch.bfloat16)
    error = (logits.float() - expected).norm() / expected.norm()
    slack = 10 if variant == "routed" else 1  # after rounding, a router may choose another expert
    assert 0 < error < slack * {Precision.FP16: 0.004, Precision.BF16: 0.025, Precision.INT8: 0.04}[precision]
    prefix = prefix_ids(tokenizer, model.config.num_slots, "")
    requests = [Request(prefix, (picture,)) for picture in tiny_pixels(2)]
    answers = generate(model, tokenizer, requests, model.config.generation)
    assert all(answer.num_tokens for answer in answers)


@pytest.mark.parametrize(("precision", "bits"), [(Precision.INT8, 8), (Precision.INT4, 4)])
@torch.inference_mode()
def test_a_quantized_linear_layer_stores_the_expected_number_of_bits_per_weight(
    precision: Precision, bits: int
) -> None:
    model, _ = wide_model()
    model.decoder.blocks[0].mlp.up.weight.fill_(0.5)  # type: ignore[union-attr,operator]
    x = torch.randn(5, 64)
    expected = linears(model)["decoder.blocks.1.mlp.up"](x)
    set_precision(model, precision)
    layers = linears(model)
    weight = layers["decoder.blocks.1.mlp.up"].weight
    assert sum(t.numel() * t.element_size() for t in stored(weight)) < (bits + 2) / 8 * weight.numel() + 256
    computed = layers["decoder.blocks.1.mlp.up"](x.bfloat16()).float()
    assert (computed - expected).norm() < 2.0 ** (1 - bits) * 1.2 * expected.norm()
    assert layers["decoder.head"].weight.data.dtype == torch.bfloat16
    assert list(stored(layers["decoder.head"].weight)) == [layers["decoder.head"].weight]


def test_layers_that_int4_does_not_support_stay_in_bf16_and_cause_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = wide_model()
    with caplog.at_level(logging.WARNING):
        set_precision(model, Precision.INT4)
    assert any("4 linear layers (encoder.blocks.0.mlp.up ...) stay bf16" in message for message in caplog.messages)
    assert len(list(stored(linears(model)["encoder.blocks.0.mlp.out"].weight))) == 1
    assert len(list(stored(linears(model)["encoder.blocks.0.attention.qkv"].weight))) == 2


def test_expert_routers_stay_in_fp32_if_a_model_is_loaded_in_lower_precision() -> None:
    model, _ = tiny_model("routed")
    set_precision(model, Precision.INT8)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {
        f"{stack}.blocks.{block}.mlp.{part}.weight"
        for stack in ("encoder", "decoder")
        for block in (0, 1)
        for part in ("router", "noise")
    }


def test_rotary_tables_stay_in_fp32_if_a_model_is_loaded_in_lower_precision() -> None:
    model, _ = tiny_model("other")
    assert model.decoder.rotary is not None
    set_precision(model, Precision.BF16)
    assert model.decoder.rotary.cos.dtype == torch.float32


def test_a_precision_whose_library_is_missing_is_an_error_with_the_install_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    model, _ = tiny_model("plain")
    with pytest.raises(UserError, match=r"int4 needs torchao.*pip install 'lakesight\[quantize\]'"):
        set_precision(model, Precision.INT4)
    set_precision(model, Precision.BF16)


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.INT8])
def test_weights_are_moved_to_the_device_in_16_bits(
    precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny_model("routed")
    save_model(tmp_path, model, tokenizer)
    moved: list[dict[str, torch.dtype]] = []
    move = VisionLanguageModel.to

    def record(model: VisionLanguageModel, *arguments: Any) -> VisionLanguageModel:
        moved.append({name: parameter.dtype for name, parameter in model.named_parameters()})
        return move(model, *arguments)

    monkeypatch.setattr(VisionLanguageModel, "to", record)
    vlm.load(tmp_path, device="cpu", precision=precision)
    routers = {name for name, dtype in moved[-1].items() if dtype is torch.float32}
    assert routers
    assert [name for name in routers if ".router." not in name and ".noise." not in name] == []


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT4])
def test_quantized_weights_cannot_be_saved_and_the_error_says_how_to_save_the_model(
    precision: Precision, tmp_path: Path
) -> None:
    model, tokenizer = wide_model()
    save_model(tmp_path / "trained", model, tokenizer)
    with pytest.raises(UserError, match=r"cannot store quantized weights.*precision fp32"):
        vlm.load(tmp_path / "trained", device="cpu", precision=precision).save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_saving_weights_of_16_bits_warns_that_they_are_rounded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_model(tmp_path, *tiny_model("plain"))
    vlm.load(tmp_path, device="cpu").save(tmp_path / "exact")
    assert caplog.text == ""
    vlm.load(tmp_path, device="cpu", precision="bf16").save(tmp_path / "rounded")
    assert "rounded to bfloat16" in caplog.text

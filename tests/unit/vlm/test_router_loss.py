"""Tests of router losses and expert loads, of padding tokens, and of the initial weights of routers and experts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tiny_models import fit_tiny, tiny_batch, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.batch import IGNORE, Batch
from vlm.factory import build_model
from vlm.layers.moe import MoeMlp, Routing
from vlm.model import VisionLanguageModel
from vlm.text.base import Tokenizer
from vlm.training.loop import StepReport
from vlm.training.objective import num_targets, routed_layers, router_loss, token_loss
from vlm.training.optim import build_adamw, parameter_groups

TEXTS = [("", "red car"), ("what is it?", "a very long blue bus"), ("", "old iphone")]


def without_noise(model: VisionLanguageModel) -> VisionLanguageModel:
    """Put a model into training mode, and remove the noise layers of its routers."""
    for layer in routed_layers(model).values():
        layer.noise = None
    return model.train()


def padded(batch: Batch, tokenizer: Tokenizer, extra: int) -> Batch:
    """Return a batch with `extra` more padding positions in each row."""
    tokens_BT = F.pad(batch.tokens_BT, (0, extra), value=tokenizer.pad_id)
    labels_BT = F.pad(batch.labels_BT, (0, extra), value=IGNORE)
    return Batch(batch.pixels_PHWC, tokens_BT, labels_BT, batch.prefix_lengths_B)


def learn(model: VisionLanguageModel, batch: Batch, steps: int) -> list[StepReport]:
    optimizer = build_adamw(model, lr=5e-3, betas=(0.9, 0.95), weight_decay=0.1)
    return fit_tiny(model, optimizer, itertools.repeat([batch], steps), lr=5e-3)


def test_padding_changes_neither_router_loss_nor_expert_load() -> None:
    model, tokenizer = tiny_model("routed")
    batch = tiny_batch(without_noise(model), tokenizer, TEXTS)
    layers, found = routed_layers(model), []
    assert list(layers) == [f"{part}.blocks.{i}" for part in ("encoder", "decoder") for i in range(2)]
    routers = [layer.router.weight for layer in layers.values()]
    for each in (batch, padded(batch, tokenizer, 9)):
        model(each)
        loss, report = router_loss(layers, each)
        found.append((loss, report.load, torch.autograd.grad(loss, routers)))
    (loss, load, gradients), (other_loss, other_load, other_gradients) = found
    torch.testing.assert_close(loss, other_loss)
    assert load == other_load
    for gradient, other in zip(gradients, other_gradients, strict=True):
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(gradient, other)


def loss_of(logits_NX: Tensor, top_k: int = 2) -> tuple[float, float, float, tuple[float, ...]]:
    """Compute weighted router loss, balance loss, z loss and expert load of a layer with the given router logits."""
    model, _ = tiny_model("routed")
    layer = model.decoder.blocks[0].mlp
    assert isinstance(layer, MoeMlp)
    layer.top_k = top_k
    best_NK, chosen_NK = logits_NX.topk(top_k)
    layer.routing = Routing(logits_NX, best_NK.softmax(-1), chosen_NK)
    ones = torch.ones(1, len(logits_NX), dtype=torch.long)
    loss, report = router_loss({"decoder.blocks.0": layer}, Batch(ones, ones, ones, ones))
    return float(loss), report.balance, report.z, report.load["decoder.blocks.0"]


def test_the_balance_loss_is_one_for_an_even_expert_load_and_largest_if_all_tokens_choose_the_same_experts() -> None:
    even = torch.eye(4).repeat(5, 1) + torch.eye(4).roll(1, 0).repeat(5, 1)
    loss, balance, z, load = loss_of(even)
    assert load == (0.25, 0.25, 0.25, 0.25)
    assert balance == pytest.approx(1.0)
    assert z == pytest.approx(math.log(2 * math.e + 2) ** 2)
    assert loss == pytest.approx(0.01 * balance + 0.001 * z)
    _, balance, _, load = loss_of(torch.tensor([[30.0, 30.0, 0.0, 0.0]]).repeat(7, 1))
    assert load == (0.5, 0.5, 0.0, 0.0)
    assert balance == pytest.approx(2.0)


def test_the_reported_loss_is_the_caption_loss_without_router_losses() -> None:
    model, tokenizer = tiny_model("routed")
    batch = tiny_batch(without_noise(model), tokenizer, TEXTS)
    with torch.no_grad():
        expected = float(token_loss(model(batch), batch) / num_targets(batch))
    (report,) = learn(model, batch, 1)
    assert report.loss == pytest.approx(expected, rel=1e-6)
    assert report.router is not None
    assert report.router.balance > 0.5
    assert all(sum(load) == pytest.approx(1) for load in report.router.load.values())


def test_training_with_the_balance_loss_evens_out_an_unbalanced_router() -> None:
    loads = []
    for weight in (0.0, 1.0):
        model, tokenizer = tiny_model("routed")
        for layer in routed_layers(model).values():
            layer.balance_weight, layer.z_weight = weight, 0.0
            layer.noise = None
        reports = learn(model, tiny_batch(model, tokenizer, TEXTS), 25)
        assert reports[-1].router is not None
        loads.append(max(max(load) * len(load) for load in reports[-1].router.load.values()))
    assert loads[1] < 1.3 < loads[0]


def test_routers_start_near_zero_and_experts_start_with_the_scale_of_linear_layers() -> None:
    large, tokenizer = tiny_model("routed")
    model = build_model(large.config, tokenizer.vocab_size)
    for layer, width in zip(routed_layers(model).values(), (16, 16, 24, 24), strict=True):
        assert isinstance(layer.noise, nn.Linear)
        assert float(layer.router.weight.std()) == pytest.approx(0.02, rel=0.3)
        assert float(layer.noise.weight.std()) == pytest.approx(0.02, rel=0.3)
        up, *_, out = (weight for weight in layer.experts.parameters() if weight.ndim == 3)
        assert float(up.std()) == pytest.approx(width**-0.5, rel=0.1)
        assert float(out.std()) == pytest.approx((16 * 2 * 2) ** -0.5, rel=0.1)  # 2 blocks, each with 2 branches


def test_a_model_without_experts_has_no_router_report() -> None:
    model, tokenizer = tiny_model("plain")
    assert [report.router for report in learn(model, tiny_batch(model, tokenizer, TEXTS), 2)] == [None, None]


def test_the_biases_of_experts_have_no_weight_decay() -> None:
    model, _ = tiny_model("routed")
    free = {id(parameter) for parameter in parameter_groups(model, 0.1)[1]["params"]}  # type: ignore[attr-defined]
    assert {id(p) for name, p in model.named_parameters() if name.endswith("bias")} <= free
    assert not {id(p) for name, p in model.named_parameters() if name.endswith("up.weight")} & free

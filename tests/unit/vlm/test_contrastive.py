"""Tests of the contrastive loss between pictures and texts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tiny_models import VARIANTS, fit_tiny, tiny_batch, tiny_config, tiny_model

from vlm.factory import build_model
from vlm.model import VisionLanguageModel
from vlm.training.contrastive import SCALE, sigmoid_loss, text_vectors
from vlm.training.loop import StepReport
from vlm.training.optim import build_adamw, set_trainable

TEXTS = [("", "red"), ("", "green leaf"), ("", "blue sea"), ("", "white")]


def naive_loss(pictures: torch.Tensor, texts: torch.Tensor, same: torch.Tensor) -> float:
    total = 0.0
    for i, j in itertools.product(range(len(pictures)), repeat=2):
        cosine = float(pictures[i] @ texts[j] / (pictures[i].norm() * texts[j].norm()))
        logit = SCALE * cosine - math.log(len(pictures) - 1)
        if i == j:
            total -= math.log(1 / (1 + math.exp(-logit)))
        elif not same[i, j]:
            total -= math.log(1 / (1 + math.exp(logit)))
    return total / len(pictures)


def test_the_contrastive_loss_equals_a_naive_computation_that_skips_pairs_with_equal_texts() -> None:
    generator = torch.Generator().manual_seed(0)
    pictures, texts = torch.randn(2, 5, 7, generator=generator)
    same = torch.eye(5, dtype=torch.bool)
    same[1, 3] = same[3, 1] = True
    assert float(sigmoid_loss(pictures, texts, same)) == pytest.approx(naive_loss(pictures, texts, same), rel=1e-5)
    others = sigmoid_loss(pictures, texts, torch.eye(5, dtype=torch.bool))
    assert float(others) > float(sigmoid_loss(pictures, texts, same))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_vector_of_a_text_depends_only_on_the_text_and_not_on_the_picture_or_on_padding(variant: str) -> None:
    model, tokenizer = tiny_model(variant)
    batch = tiny_batch(model, tokenizer, TEXTS)
    vectors = text_vectors(model, batch)
    torch.testing.assert_close(text_vectors(model, tiny_batch(model, tokenizer, TEXTS, seed=1)), vectors)
    torch.testing.assert_close(text_vectors(model, tiny_batch(model, tokenizer, TEXTS[:1])), vectors[:1])
    assert float(torch.cdist(vectors, vectors).fill_diagonal_(1).min()) > 1e-3


def train(weight: float, variant: str = "plain", steps: int = 60) -> tuple[VisionLanguageModel, list[StepReport]]:
    _, tokenizer = tiny_model(variant)
    torch.manual_seed(0)
    model = build_model(tiny_config(variant), tokenizer.vocab_size)
    optimizer = build_adamw(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    batches = itertools.repeat([tiny_batch(model, tokenizer, TEXTS)], steps)
    return model, fit_tiny(model, optimizer, batches, lr=3e-3, contrastive=weight)


def test_training_lowers_the_contrastive_loss_in_addition_to_the_caption_loss() -> None:
    _, reports = train(1.0)
    first, last = reports[0].contrastive, reports[-1].contrastive
    assert first
    assert last
    assert last < 0.5 * first
    assert reports[-1].loss < 0.5 * reports[0].loss


def test_a_contrastive_loss_of_weight_zero_is_not_reported_and_changes_no_caption_loss() -> None:
    _, reports = train(0.0, steps=3)
    _, tiny = train(1e-12, steps=3)
    assert [report.contrastive for report in reports] == [None] * 3
    assert [report.loss for report in reports] == pytest.approx([report.loss for report in tiny], rel=1e-6)


def test_a_mixture_of_experts_has_the_same_router_losses_with_and_without_the_contrastive_loss() -> None:
    variant = "moe" if "moe" in VARIANTS else next(name for name in VARIANTS if has_experts(name))
    reports = [train(weight, variant, steps=1)[1][0] for weight in (0.0, 1.0)]
    assert reports[0].router
    assert reports[0].router == reports[1].router


def has_experts(variant: str) -> bool:
    return tiny_config(variant).decoder.transformer.mlp.kind == "moe"


def test_a_stage_that_trains_only_weights_without_effect_on_the_contrastive_loss_trains_on_the_texts() -> None:
    model, tokenizer = tiny_model("plain")
    set_trainable(model, {"decoder.head.*": 1.0})
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = build_adamw(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    batches = itertools.repeat([tiny_batch(model, tokenizer, TEXTS)], 3)
    reports = fit_tiny(model, optimizer, batches, lr=3e-3, contrastive=0.5)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed
    assert all(name.startswith("decoder.head.") for name in changed)
    assert reports[0].contrastive == pytest.approx(reports[-1].contrastive)

"""Tests of the whole model: which positions influence a logit, the loss before training, and errors."""

import math

import pytest
import torch
from tiny_models import VARIANTS, tiny_batch, tiny_config, tiny_model, tiny_pixels

from vlm.batch import IGNORE, Batch
from vlm.factory import build_model
from vlm.text.base import SLOT
from vlm.training.objective import blind_losses, num_targets, row_losses, token_loss

TEXTS = [("", "a red car"), ("what?", "bus"), ("", "sky")]


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_does_not_change_the_logits(variant: str) -> None:
    model, tokenizer = tiny_model(variant)
    together = tiny_batch(model, tokenizer, TEXTS)
    logits = model(together).split((together.labels_BT != IGNORE).sum(dim=1).tolist())
    for i, text in enumerate(TEXTS):
        alone = tiny_batch(model, tokenizer, [text]).with_pixels(together.pixels_PHWC[i : i + 1])
        torch.testing.assert_close(model(alone), logits[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_logits_of_a_position_do_not_depend_on_later_answer_tokens(variant: str) -> None:
    model, tokenizer = tiny_model(variant)
    one, two = (tiny_batch(model, tokenizer, [("go?", answer)]) for answer in ("abcd", "abxy"))
    # Both answers start with ab, so their first three logits must be equal, and their fourth logits must differ.
    torch.testing.assert_close(model(one)[:3], model(two)[:3])
    assert not torch.allclose(model(one)[3], model(two)[3])


def test_picture_positions_attend_to_the_prompt_only_in_a_prefix_lm() -> None:
    for variant, attends in (("other", False), ("prefix", True)):
        model, tokenizer = tiny_model(variant)
        one, two = (tiny_batch(model, tokenizer, [(prompt, "z")]) for prompt in ("abc", "abd"))
        slots = model.config.num_slots
        same = torch.allclose(model.hidden_states(one)[:, :slots], model.hidden_states(two)[:, :slots], atol=1e-6)
        assert same is not attends


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_predicted_first_answer_token_depends_on_the_picture(variant: str) -> None:
    model, tokenizer = tiny_model(variant)
    batch = tiny_batch(model, tokenizer, [("", "a"), ("", "a")])
    first = model(batch)[0::2]
    assert not torch.allclose(first[0], first[1])


@pytest.mark.parametrize("select", ["patches", "mean", "cls"])
def test_the_number_of_image_slots_follows_from_the_selection_of_encoder_features(select: str) -> None:
    config = tiny_config("plain")
    vision = config.vision.model_copy(update={"select": select})
    config = config.model_copy(update={"vision": vision})
    model = build_model(config, 40).eval()
    assert model.encode(tiny_pixels(2)).shape == (2, config.num_slots, 24)
    assert config.num_slots == (4 if select == "patches" else 1)


def test_a_batch_with_a_wrong_number_of_image_slots_is_an_error() -> None:
    model, tokenizer = tiny_model("plain")
    batch = tiny_batch(model, tokenizer, [("", "a")])
    broken = Batch(
        batch.pixels_PHWC,
        batch.tokens_BT.masked_fill(batch.tokens_BT == SLOT, 5),
        batch.labels_BT,
        batch.prefix_lengths_B,
    )
    with pytest.raises(ValueError, match="the batch has 0 image slots, but 1 pictures need 4 slots each"):
        model(broken)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_before_training_is_the_loss_of_a_uniform_distribution(variant: str) -> None:
    config = tiny_config(variant)
    torch.manual_seed(0)
    model = build_model(config, 34).eval()
    _, tokenizer = tiny_model(variant)
    batch = tiny_batch(model, tokenizer, TEXTS)
    loss = token_loss(model(batch), batch) / num_targets(batch)
    assert abs(float(loss) - math.log(34)) < 0.1


def test_the_losses_of_the_rows_sum_to_the_loss_of_the_batch() -> None:
    model, tokenizer = tiny_model("plain")
    batch = tiny_batch(model, tokenizer, TEXTS)
    sums, counts = row_losses(model, batch)
    torch.testing.assert_close(sums.sum(), token_loss(model(batch), batch))
    assert counts.tolist() == [len(answer) + 1 for _, answer in TEXTS]


def test_the_blind_gap_of_a_model_that_ignores_pictures_is_zero() -> None:
    model, tokenizer = tiny_model("plain")
    batch = tiny_batch(model, tokenizer, TEXTS)
    rolled = batch.pixels_PHWC.roll(1, 0)
    right, wrong, _ = blind_losses(model, batch, rolled)
    assert not torch.allclose(right, wrong)
    torch.nn.init.zeros_(model.projector.weight)  # type: ignore[arg-type]
    right, wrong, _ = blind_losses(model, batch, rolled)
    torch.testing.assert_close(right, wrong)

"""Metrics: the numbers of pycocoevalcap, honest intervals, honest floors."""

from __future__ import annotations

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from pipelines.driver.metrics import Scored, measure, words

TRUTH = [
    ["a red square left of a blue circle", "a red square and a blue circle"],
    ["a small green triangle"],
    ["two dogs run on a beach", "dogs on the beach"],
    ["a man rides a horse"],
]
MADE = ["a red square left of a circle", "a small green triangle", "a dog runs on a beach", "a red square"]


def scored(truth: list[list[str]], made: list[str], *, gap: float | None = 1.0, tokens: int = 5) -> list[Scored]:
    return [
        Scored(
            row=row,
            image_id=f"x/{row}",
            prompt="",
            references=tuple(references),
            caption=caption,
            loss=0.5 * tokens,
            blind_loss=None if gap is None else (0.5 + gap) * tokens,
            num_targets=tokens,
        )
        for row, (references, caption) in enumerate(zip(truth, made, strict=True))
    ]


def test_scores_are_those_of_pycocoevalcap() -> None:
    metrics = measure(scored(TRUTH, MADE))
    truth = {i: [" ".join(words(t)) for t in group] for i, group in enumerate(TRUTH)}
    made = {i: [" ".join(words(caption))] for i, caption in enumerate(MADE)}
    bleu, _ = Bleu().compute_score(truth, made, verbose=0)
    assert [metrics[f"bleu_{n}"].value for n in (1, 2, 3, 4)] == pytest.approx(bleu, rel=1e-12)
    assert metrics["cider"].value == pytest.approx(Cider().compute_score(truth, made)[0])
    assert metrics["rouge_l"].value == pytest.approx(Rouge().compute_score(truth, made)[0])


def test_perfect_captions_score_full_marks_and_hopeless_ones_zero() -> None:
    perfect = measure(scored(TRUTH, [group[0] for group in TRUTH]))
    assert perfect["exact_match"].value == perfect["word_f1"].value == perfect["rouge_l"].value == 1
    assert perfect["bleu_1"].value == pytest.approx(1)
    hopeless = measure(scored(TRUTH, ["zebra"] * 4))
    for name in ("exact_match", "word_f1", "rouge_l", "cider", "bleu_4"):
        assert hopeless[name].value == pytest.approx(0, abs=1e-6)
    assert hopeless["distinct"].value == 0.25


def test_an_empty_caption_is_measured_and_not_an_error() -> None:
    metrics = measure(scored(TRUTH, ["", "", "", ""]))
    assert metrics["words"].value == metrics["exact_match"].value == 0
    assert all(np.isfinite([m.value, m.low, m.high]).all() for m in metrics.values())


def test_losses_weigh_by_token_and_not_by_picture() -> None:
    short, long = scored([["a"], ["b"]], ["a", "b"])
    short = Scored(**vars(short) | {"loss": 3.0, "blind_loss": 3.0, "num_targets": 1})
    long = Scored(**vars(long) | {"loss": 9.0, "blind_loss": 18.0, "num_targets": 9})
    metrics = measure([short, long])
    assert metrics["loss"].value == pytest.approx(1.2)
    assert metrics["blind_gap"].value == pytest.approx(0.9)


def test_one_picture_has_no_blind_gap_and_no_cider() -> None:
    metrics = measure(scored(TRUTH[:1], MADE[:1], gap=None))
    assert not {"blind_gap", "cider", "floor_cider"} & set(metrics)
    assert metrics["exact_match"].value == 0


def test_intervals_cover_the_value_repeat_by_seed_and_shrink_with_more_pictures() -> None:
    rng = np.random.default_rng(0)

    def sample(n: int) -> list[Scored]:
        return scored([["yes"]] * n, ["yes" if rng.random() < 0.7 else "no" for _ in range(n)])

    few, many = sample(20), sample(2000)
    small, large = measure(few)["exact_match"], measure(many)["exact_match"]
    for interval in (small, large):
        assert interval.low <= interval.value <= interval.high
    assert large.high - large.low < (small.high - small.low) / 4
    # A proportion's own theory: 1.96 standard errors either side.
    assert large.high - large.low == pytest.approx(2 * 1.96 * (0.7 * 0.3 / 2000) ** 0.5, rel=0.25)
    assert measure(few) == measure(few)
    assert measure(few, seed=1)["exact_match"] != small


def test_questions_about_one_picture_are_resampled_together() -> None:
    items = [Scored(**vars(item) | {"row": item.row // 10}) for item in scored([["y"]] * 100, ["y"] * 50 + ["n"] * 50)]
    alone = scored([["y"]] * 100, ["y"] * 50 + ["n"] * 50)
    together, apart = measure(items)["exact_match"], measure(alone)["exact_match"]
    assert together.value == apart.value == 0.5
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_the_floor_is_the_best_caption_that_ignores_the_picture() -> None:
    truth = [["a cat"], ["a cat"], ["a dog"], ["a big red cat"]]
    metrics = measure(scored(truth, ["a dog"] * 4))
    assert metrics["floor_exact_match"].value == 0.5
    assert metrics["floor_word_f1"].value == pytest.approx((1 + 1 + 1 / 2 + 2 / 3) / 4)
    constant = measure(scored(truth, ["a cat"] * 4))
    assert constant["exact_match"].value == metrics["floor_exact_match"].value
    assert constant["word_f1"].value == metrics["floor_word_f1"].value
    assert constant["cider"].value == metrics["floor_cider"].value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Red square, left.", ["a", "red", "square", "left"]),
        ("the dog's bone", ["the", "dog's", "bone"]),
        (":-)", [":", "-", ")"]),
        ("", []),
    ],
)
def test_words_are_lower_case_and_without_punctuation(text: str, expected: list[str]) -> None:
    assert words(text) == expected

"""Tests of caption metrics: comparison with pycocoevalcap, intervals, baselines, evaluation slices, paired
differences.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from scored_rows import scored_row

from pipelines.driver.evaluate.baselines import best_constants, constant_cider
from pipelines.driver.evaluate.bootstrap import measure, metric_differences, slice_metrics, slices_of
from pipelines.driver.evaluate.coco import has_java, java_metrics
from pipelines.driver.evaluate.metrics import COCO_TOKENISATION, ScoredRow, ratio, tokenisation_of
from pipelines.driver.evaluate.run import reference_lengths
from vlm.text.words import words

TRUTH = [
    ["a red square left of a blue circle", "a red square and a blue circle"],
    ["a small green triangle"],
    ["two dogs run on a beach", "dogs on the beach"],
    ["a man rides a horse"],
]
MADE = ["a red square left of a circle", "a small green triangle", "a dog runs on a beach", "a red square"]


def scored(truth: list[list[str]], made: list[str], *, gap: float | None = 1.0, tokens: int = 5) -> list[ScoredRow]:
    return [
        scored_row(
            row,
            references,
            caption,
            neighbour=references[-1],
            loss=0.5 * tokens,
            blind_loss=None if gap is None else (0.5 + gap) * tokens,
            blank_loss=0.75 * tokens,
            noise_loss=1.5 * tokens,
            num_targets=tokens,
            num_correct=4,
            num_tokens=tokens + 1,
        )
        for row, (references, caption) in enumerate(zip(truth, made, strict=True))
    ]


def test_metrics_equal_the_scores_of_pycocoevalcap() -> None:
    metrics = measure(scored(TRUTH, MADE))
    truth = {i: [" ".join(words(t)) for t in group] for i, group in enumerate(TRUTH)}
    made = {i: [" ".join(words(caption))] for i, caption in enumerate(MADE)}
    bleu, _ = Bleu().compute_score(truth, made, verbose=0)
    assert [metrics[f"bleu_{n}"].value for n in (1, 2, 3, 4)] == pytest.approx(bleu, rel=1e-12)
    assert metrics["cider"].value == pytest.approx(Cider().compute_score(truth, made)[0])
    assert metrics["rouge_l"].value == pytest.approx(Rouge().compute_score(truth, made)[0])


def test_perfect_captions_have_the_best_scores_and_unrelated_captions_have_scores_of_zero() -> None:
    perfect = measure(scored(TRUTH, [group[0] for group in TRUTH]))
    assert perfect["exact_match"].value == perfect["word_f1"].value == perfect["rouge_l"].value == 1
    assert perfect["bleu_1"].value == pytest.approx(1)
    hopeless = measure(scored(TRUTH, ["zebra"] * 4))
    for name in ("exact_match", "word_f1", "rouge_l", "cider", "bleu_4"):
        assert hopeless[name].value == pytest.approx(0, abs=1e-6)
    assert hopeless["distinct"].value == 0.25


def test_empty_captions_have_finite_metrics() -> None:
    metrics = measure(scored(TRUTH, ["", "", "", ""]))
    assert metrics["words"].value == metrics["exact_match"].value == 0
    assert all(np.isfinite([m.value, m.low, m.high]).all() for m in metrics.values())


def test_losses_are_averaged_over_tokens_and_not_over_rows() -> None:
    short, long = scored([["a"], ["b"]], ["a", "b"])
    short = ScoredRow(**vars(short) | {"loss": 3.0, "blind_loss": 3.0, "num_targets": 1})
    long = ScoredRow(**vars(long) | {"loss": 9.0, "blind_loss": 18.0, "num_targets": 9})
    metrics = measure([short, long])
    assert metrics["loss"].value == pytest.approx(1.2)
    assert metrics["blind_gap"].value == pytest.approx(0.9)


def test_a_split_of_one_picture_has_neither_a_blind_gap_nor_a_cider() -> None:
    metrics = measure(scored(TRUTH[:1], MADE[:1], gap=None))
    assert not {"blind_gap", "cider", "constant_cider"} & set(metrics)
    assert metrics["exact_match"].value == 0


def test_a_confidence_interval_contains_its_metric_and_becomes_narrower_with_more_pictures() -> None:
    rng = np.random.default_rng(0)

    def sample(n: int) -> list[ScoredRow]:
        return scored([["yes"]] * n, ["yes" if rng.random() < 0.7 else "no" for _ in range(n)])

    few, many = sample(20), sample(2000)
    small, large = measure(few)["exact_match"], measure(many)["exact_match"]
    for interval in (small, large):
        assert interval.low <= interval.value <= interval.high
    assert large.high - large.low < (small.high - small.low) / 4
    # The expected width comes from the normal approximation: 1.96 standard errors on either side of the share.
    assert large.high - large.low == pytest.approx(2 * 1.96 * (0.7 * 0.3 / 2000) ** 0.5, rel=0.25)
    assert measure(few) == measure(few)
    assert measure(few, seed=1)["exact_match"] != small


def test_the_bootstrap_resamples_all_questions_about_one_picture_together() -> None:
    items = [
        ScoredRow(**vars(item) | {"row": item.row // 10}) for item in scored([["y"]] * 100, ["y"] * 50 + ["n"] * 50)
    ]
    alone = scored([["y"]] * 100, ["y"] * 50 + ["n"] * 50)
    together, apart = measure(items)["exact_match"], measure(alone)["exact_match"]
    assert together.value == apart.value == 0.5
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_the_constant_baseline_is_the_best_single_caption_by_each_metric() -> None:
    truth = [["a cat"], ["a cat"], ["a dog on a mat"], ["a big red dog on a mat"], ["a dog"]]
    rows = scored(truth, ["?"] * 5)
    metrics, constants = measure(rows), best_constants(rows)
    assert (constants["exact_match"], constants["cider"]) == ("a cat", "a dog on a mat")
    spelled = {text for group in truth for text in group}
    of_each = {text: measure([replace(row, caption=text) for row in rows]) for text in spelled}
    for name in ("exact_match", "word_f1", "rouge_l", "bleu_1", "bleu_4", "cider"):
        assert metrics[f"constant_{name}"] == of_each[constants[name]][name]
        assert metrics[f"constant_{name}"].value == max(each[name].value for each in of_each.values())


def test_cider_of_a_constant_caption_equals_the_score_of_pycocoevalcap() -> None:
    references = [[words(text) for text in group] for group in [*TRUTH, TRUTH[0][:1] * 3]]
    candidates = [words(text) for text in (*MADE, "zebra", "")]
    truth = {i: [" ".join(text) for text in group] for i, group in enumerate(references)}
    expected = [Cider().compute_score(truth, {i: [" ".join(each)] for i in truth})[0] for each in candidates]
    assert constant_cider(candidates, references) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Red square, left.", ["a", "red", "square", "left"]),
        ("the dog's bone", ["the", "dog's", "bone"]),
        (":-)", [":", "-", ")"]),
        ("", []),
    ],
)
def test_the_words_of_a_text_are_lower_case_and_have_no_punctuation(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_rows_without_a_caption_count_in_the_error_share_but_not_in_the_score_metrics() -> None:
    metrics = measure([*scored(TRUTH, MADE), replace(scored(TRUTH, MADE)[0], row=9, caption=None)])
    wanted = {"token_accuracy": 0.8, "blank_gap": 0.25, "noise_gap": 1.0, "tokens": 6.0, "captions_per_second": 4.0}
    assert {name: metrics[name].value for name in wanted} == pytest.approx(wanted)
    assert metrics["error_share"].value == pytest.approx(0.2)


def test_the_metrics_named_distinct_are_the_shares_of_different_words_and_word_pairs_and_captions() -> None:
    metrics = measure(scored([["x"]] * 3, ["a b", "a b", "a c"]))
    assert metrics["distinct"].value == pytest.approx(2 / 3)
    assert metrics["distinct_1"].value == pytest.approx(3 / 6)
    assert metrics["distinct_2"].value == pytest.approx(2 / 3)


def test_the_neighbour_baseline_is_left_out_if_any_row_has_no_neighbour() -> None:
    rows = scored(TRUTH, MADE)
    metrics, same = measure(rows), measure([replace(row, caption=row.neighbour) for row in rows])
    assert metrics["neighbour_cider"] == same["cider"]
    assert "neighbour_cider" not in measure([*rows[1:], replace(rows[0], neighbour=None)])


@pytest.mark.skipif(not has_java(), reason="COCO's tokenizer and METEOR are Java programs")
@pytest.mark.matrix  # the test starts six Java programs
def test_coco_metrics_equal_those_of_pycocoevalcap_even_if_a_picture_repeats_a_reference_caption(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compare our metrics with pycocoevalcap's. Some texts have punctuation that only the tokenizer of pycocoevalcap
    splits.

    The last two rows are Hindi: the wrong caption shares vowel signs with the right caption, but no word.
    """
    texts = ["A man isn't on (the) horse.", "two dogs' toys, 3.14 m", "a t-shirt; a cap", "a red square", "dogs run"]
    cat, cow = "\u092c\u093f\u0932\u094d\u0932\u0940 \u091a\u091f\u093e\u0908", "\u0917\u093e\u092f \u0915\u0940"
    truth = [*([texts[(row + n * n) % 5] for n in range(5)] for row in range(12)), [cat], [cat]]
    made = [*(group[0] if row % 3 else texts[row % 5] for row, group in enumerate(truth[:12])), cat, cow]
    assert any(len(set(group)) < len(group) for group in truth)
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Dfile.encoding=UTF-8")  # pycocoevalcap uses the encoding of the locale
    tokenizer = PTBTokenizer()
    gts = tokenizer.tokenize({i: [{"caption": text} for text in group] for i, group in enumerate(truth)})
    res = tokenizer.tokenize({i: [{"caption": text}] for i, text in enumerate(made)})
    bleu, _ = Bleu().compute_score(gts, res, verbose=0)
    scorers = {"coco_cider": Cider(), "coco_rouge_l": Rouge(), "coco_meteor": Meteor()}
    expected = {name: scorer.compute_score(gts, res)[0] for name, scorer in scorers.items()}
    expected |= {f"coco_bleu_{n}": value for n, value in enumerate(bleu, start=1)}
    metrics = java_metrics(scored(truth, made))
    found = {name: float(metrics[name](np.ones((1, len(made))))[0]) for name in expected}
    assert found == pytest.approx(expected, abs=1e-9)
    assert tokenisation_of("coco_cider") == COCO_TOKENISATION != tokenisation_of("cider")
    hindi = np.array([[0.0] * 12 + [1, 0], [0.0] * 12 + [0, 1]])
    assert metrics["meteor"](hindi).tolist() == [1, 0]


def test_every_metric_that_compares_words_has_a_recorded_tokenisation() -> None:
    metrics = measure(scored(TRUTH * 30, MADE * 30), further={"meteor": ratio([1.0] * 120)})
    without = {"loss", "token_accuracy", "tokens", "captions_per_second", "mean_logprob", "brightness", "contrast"}
    without |= {"blind_gap", "blank_gap", "noise_gap", "error_share"}
    without |= {"exact_match", "constant_exact_match", "neighbour_exact_match"}
    assert {name for name in metrics if tokenisation_of(name) is None} == without


def test_a_paired_difference_can_be_significant_even_if_the_intervals_of_the_two_models_overlap() -> None:
    """Compare two models whose captions differ in the first 10 rows and are equal in the other 90 rows."""
    rng = np.random.default_rng(3)
    easy = rng.random(100) < 0.5
    worse = scored([["y"]] * 100, ["y" if e and n >= 10 else "n" for n, e in enumerate(easy)])
    better = scored([["y"]] * 100, ["y" if e or n < 10 else "n" for n, e in enumerate(easy)])
    gain = metric_differences(better, list(reversed(worse)))["exact_match"]
    apart = measure(better)["exact_match"], measure(worse)["exact_match"]
    assert gain.value == pytest.approx(apart[0].value - apart[1].value) == pytest.approx(0.1)
    assert gain.low > 0
    assert apart[0].low < apart[1].high  # the intervals of the two models overlap
    assert metric_differences(worse, better)["exact_match"].high < 0
    assert metric_differences(better, better)["bleu_1"].model_dump() == {"value": 0, "low": 0, "high": 0}


def test_two_models_are_compared_only_on_rows_that_both_captioned() -> None:
    one, other = scored(TRUTH, MADE), scored(TRUTH, [group[0] for group in TRUTH])
    failed = [replace(other[0], caption=None), *other[1:3]]
    assert metric_differences(one, failed) == metric_differences(one[1:3], other[1:3])
    assert metric_differences(one[:1], other[1:]) == {}


def test_evaluation_slices_cover_all_rows_and_a_numeric_column_is_sliced_by_its_quartiles() -> None:
    rows = scored([["y"]] * 40, ["y" if n % 4 == 0 else "n" for n in range(40)])
    formats = ["PNG" if n % 4 == 0 else "JPEG" for n in range(40)]
    found = slice_metrics(rows, {"format": formats, "size": list(range(40))}, names=["exact_match", "loss"])
    assert {name: part["exact_match"].value for name, part in found.items() if "format" in name} == {
        "format=JPEG": 0,
        "format=PNG": 1,
    }
    quarters = [part["exact_match"].value for name, part in found.items() if "size" in name]
    assert len(quarters) == 4
    assert np.mean(quarters) == pytest.approx(measure(rows)["exact_match"].value, abs=0.01)
    assert all(part["loss"].value == 0.5 for part in found.values())
    assert slice_metrics(rows, {"source": ["one"] * 40}, names=["loss"]) == {}


def test_rows_of_one_picture_with_different_prompts_belong_to_the_slices_of_their_own_reference_lengths() -> None:
    rows = [
        replace(row, image_id=f"x/{row.row // 2}", prompt=prompt, references=(text,))
        for row in scored([["y"]] * 40, ["y"] * 40)
        for prompt, text in [("what colour", "red") if row.row % 2 else ("describe", "a red square on a table")]
    ]
    inside = slices_of({"length": reference_lengths(rows)})
    assert {name: int(mask.sum()) for name, mask in inside.items()} == {"length=1": 20, "length=6": 20}
    assert all(rows[n].prompt == "what colour" for n in np.flatnonzero(inside["length=1"]))

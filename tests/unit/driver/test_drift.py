"""Tests of drift: the statistics of a caption job are compared with an evaluation of the model version."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import DriftConfig
from pipelines.driver.caption.drift import EvaluationFigures, compare_figures
from pipelines.formats.caption_stats import SAMPLED_CAPTIONS, CaptionStats, sum_stats
from vlm.text.words import words

BEFORE = {
    "words": 6.0,
    "distinct_words": 40.0,
    "mean_logprob": -0.5,
    "error_share": 0.0,
    "brightness": 120.0,
    "contrast": 60.0,
}
SAID = st.lists(
    st.sampled_from(["a red square", "a Red circle!", "dogs run on a beach", "no no no", ":-)"]), min_size=1
)


@given(st.lists(SAID, min_size=1, max_size=5))
def test_caption_statistics_computed_in_parts_add_up_to_the_statistics_of_all_captions(parts: list[list[str]]) -> None:
    tallies = [[CaptionStats.from_caption(text, -0.25) for text in part] for part in parts]
    whole = sum_stats(tally for part in tallies for tally in part)
    assert sum_stats(map(sum_stats, tallies)) == whole
    assert CaptionStats.model_validate_json(whole.model_dump_json()) == whole
    flat = [text for part in parts for text in part]
    assert whole.captions_with_word.get("no", 0) == flat.count("no no no"), "the count is one for each caption"
    assert whole.captioned == len(flat)
    assert whole.figures()["words"] == pytest.approx(np.mean([len(words(text)) for text in flat]))
    assert whole.figures()["mean_logprob"] == pytest.approx(-0.25)


def test_the_number_of_distinct_words_is_counted_in_a_sample_of_fixed_size() -> None:
    rng = np.random.default_rng(0)
    captions = [f"a w{rng.geometric(0.05)} v{number % 7}" for number in range(500)]
    expected = np.mean(
        [
            len({w for place in rng.permutation(500)[:SAMPLED_CAPTIONS] for w in captions[place].split()})
            for _ in range(400)
        ]
    )
    figures = sum_stats(CaptionStats.from_caption(text, 0.0) for text in captions).figures()
    assert figures["distinct_words"] == pytest.approx(expected, rel=0.02)
    assert (
        "distinct_words"
        not in sum_stats(CaptionStats.from_caption(text, 0.0) for text in captions[: SAMPLED_CAPTIONS - 1]).figures()
    )


def test_the_error_share_is_the_only_drift_figure_of_a_caption_job_in_which_all_rows_failed() -> None:
    assert CaptionStats().figures() == sum_stats([]).figures() == {}
    assert CaptionStats(errors=3).figures() == {"error_share": 1.0}


@pytest.mark.parametrize(
    ("now", "beyond"),
    [
        ({}, set()),
        ({"words": 7.7, "distinct_words": 59.0, "mean_logprob": -0.9, "error_share": 0.04, "brightness": 151}, set()),
        ({"words": 4.0}, {"words"}),
        ({"words": 8.0}, {"words"}),
        ({"distinct_words": 12.0}, {"distinct_words"}),
        ({"mean_logprob": -1.1}, {"mean_logprob"}),
        ({"error_share": 0.06}, {"error_share"}),
        ({"brightness": 80.0, "contrast": 10.0}, {"brightness", "contrast"}),
    ],
)
def test_a_caption_statistic_that_differs_by_more_than_its_limit_is_reported_as_drift(
    now: dict[str, float], beyond: set[str]
) -> None:
    found = compare_figures(BEFORE | now, 500, EvaluationFigures(figures=BEFORE, rows=300), DriftConfig(), prompt="")
    assert set(found) == set(BEFORE)
    assert {name for name, drift in found.items() if drift.beyond} == beyond


def test_drift_is_not_computed_for_few_rows_and_only_in_part_for_jobs_with_a_prompt() -> None:
    dark, limits = BEFORE | {"brightness": 0.0, "words": 1.0}, DriftConfig()
    measure = EvaluationFigures(figures=BEFORE, rows=300)
    assert compare_figures(dark, 99, measure, limits, prompt="") == {}
    assert compare_figures(dark, 500, EvaluationFigures(figures=BEFORE, rows=99), limits, prompt="") == {}
    assert compare_figures(dark, 500, EvaluationFigures(figures={}, rows=0), limits, prompt="") == {}
    asked = compare_figures(dark, 500, measure, limits, prompt="what colour is it")
    assert {name: drift.beyond for name, drift in asked.items()} == {
        "error_share": False,
        "brightness": True,
        "contrast": False,
    }

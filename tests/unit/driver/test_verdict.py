"""Tests of the sentence that says how good the captions of an evaluation are."""

from __future__ import annotations

import pytest

from pipelines.driver.evaluate.bootstrap import Interval
from pipelines.driver.evaluate.verdict import verdict


def metrics(**values: float) -> dict[str, Interval]:
    """Return metrics whose confidence intervals extend 0.1 below and 0.1 above the value."""
    return {name: Interval(value=value, low=value - 0.1, high=value + 0.1) for name, value in values.items()}


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (
            metrics(cider=2.0, constant_cider=0.5, neighbour_cider=1.5, blind_gap=1.0),
            "On 2,000 pictures, the captions (CIDEr 2) are better than the best constant caption (0.5) and the caption "
            "of the most similar training picture (1.5); the model uses its pictures (blind gap 1 nats per "
            "token, limit 0.1).",
        ),
        (
            metrics(cider=2.0, constant_cider=2.05, neighbour_cider=3.5, blind_gap=-0.05),
            "On 2,000 pictures, the captions (CIDEr 2) are not clearly better than the best constant caption (2.05), "
            "and worse than the caption of the most similar training picture (3.5); the model ignores its pictures "
            "(blind gap -0.05 nats per token, limit 0.1).",
        ),
        (metrics(word_f1=0.5, constant_word_f1=0.2), "(word F1 0.5) are better than the best constant caption (0.2)."),
        (
            metrics(word_f1=0.5, constant_word_f1=0.2) | {"blind_gap": Interval(value=0.381, low=-0.249, high=1.659)},
            "; these pictures are too few to say whether the model uses its pictures (blind gap 0.381 nats per token, "
            "limit 0.1).",
        ),
        (metrics(loss=1.0), "The captions of 2,000 pictures were not compared with a baseline."),
    ],
)
def test_the_verdict_says_whether_captions_beat_the_baselines_and_use_the_pictures(
    found: dict[str, Interval], sentence: str
) -> None:
    assert verdict(found, 2000).endswith(sentence)


@pytest.mark.parametrize(
    ("gap", "limit", "said"),
    [
        (Interval(value=0.2, low=0.1, high=0.3), 0.1, "the model uses its pictures ("),
        (Interval(value=0.2, low=0.1, high=0.3), 0.25, "the model uses its pictures less than the gate requires ("),
        (Interval(value=0.03, low=0.025, high=0.035), 0.1, "the model uses its pictures less than the gate requires ("),
        (Interval(value=0.0, low=-0.01, high=0.01), 0.1, "the model ignores its pictures ("),
        (Interval(value=0.05, low=-0.2, high=0.3), 0.1, "these pictures are too few to say"),
    ],
)
def test_the_verdict_does_not_contradict_the_limit_of_the_gate(gap: Interval, limit: float, said: str) -> None:
    assert f"; {said}" in verdict(metrics(cider=2.0, constant_cider=0.5) | {"blind_gap": gap}, 20, limit)

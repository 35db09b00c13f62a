"""Verdict of an evaluation in one sentence: whether the captions beat the baselines and depend on the pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pipelines.config import GateConfig
from pipelines.driver.evaluate.bootstrap import Interval
from pipelines.driver.evaluate.gallery import NAMES

BASELINES = {"constant": "the best constant caption", "neighbour": "the caption of the most similar training picture"}
JUDGED = ("cider", "word_f1")
"""Metrics by which captions can be compared with the baselines, in order of preference."""


class Comparison(NamedTuple):
    """Comparison of the captions with one baseline.

    The captions count as better or worse than the baseline only if the baseline's value is outside the model's
    interval.
    """

    name: str
    value: float
    outcome: str


def verdict(metrics: Mapping[str, Interval], pictures: int, min_blind_gap: float = GateConfig().min_blind_gap) -> str:
    """Return one sentence that says how good the captions are.

    Args:
        metrics: metrics of the split, including the metrics of the baselines.
        pictures: number of pictures of the split.
        min_blind_gap: smallest blind gap that the promotion gate accepts, in nats per token.
    """
    count = f"{pictures:,} picture{'s' * (pictures > 1)}"
    judged = next((name for name in JUDGED if name in metrics), None)
    if judged is None:
        return f"The captions of {count} were not compared with a baseline."
    found = [
        Comparison(text, metrics[key].value, _outcome(metrics[judged], metrics[key].value))
        for baseline, text in BASELINES.items()
        if (key := f"{baseline}_{judged}") in metrics
    ]
    by_outcome: dict[str, list[str]] = {}
    for each in found:
        by_outcome.setdefault(each.outcome, []).append(f"{each.name} ({each.value:.3g})")
    compared = ", and ".join(f"{outcome} {' and '.join(names)}" for outcome, names in by_outcome.items())
    captions = f"the captions ({NAMES[judged]} {metrics[judged].value:.3g}) are {compared}"
    return f"On {count}, {captions}{_pictures(metrics, min_blind_gap)}."


def _outcome(metric: Interval, baseline: float) -> str:
    if metric.low > baseline:
        return "better than"
    return "worse than" if metric.high < baseline else "not clearly better than"


def _pictures(metrics: Mapping[str, Interval], limit: float) -> str:
    """Return a phrase that says whether the captions depend on the pictures, or "" if there is no blind gap.

    The gate compares the value of the blind gap with the limit, and the phrase never contradicts the result of the
    gate.
    """
    gap = metrics.get("blind_gap")
    if gap is None:
        return ""
    value = f"blind gap {gap.value:.3g} nats per token, limit {limit:g}"
    if gap.low > 0 and gap.value >= limit:
        return f"; the model uses its pictures ({value})"
    if gap.low > 0:
        return f"; the model uses its pictures less than the gate requires ({value})"
    if gap.high < limit:
        return f"; the model ignores its pictures ({value})"
    return f"; these pictures are too few to say whether the model uses its pictures ({value})"

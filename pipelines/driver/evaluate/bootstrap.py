"""Bootstrap confidence intervals of metrics: of one model, of the difference of two models, and of slices.

The bootstrap resamples pictures, not rows, so all questions about a picture are drawn together. Two models are compared
on the same resamples (paired bootstrap), so the difficulty of a picture affects both and cancels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipelines.driver.evaluate.metrics import (
    Floats,
    Metric,
    ScoredRow,
    baseline_metrics,
    captioned,
    model_metrics,
    ratio,
)
from vlm.config import Config

RESAMPLES = 200
MAX_VALUES = 8
"""A column with more distinct numbers is sliced by quartile; of a column of text, the most frequent values are kept."""
MIN_SLICE_ROWS = 2


class Interval(Config):
    """Value of a metric and its 95 % bootstrap interval: the 2.5th and 97.5th percentile over resamples."""

    value: float
    low: float
    high: float


def draw_weights(scored: Sequence[ScoredRow], *, seed: int = 0) -> Floats:
    """Draw the weights of the rows in each resample, shape (RESAMPLES + 1, rows).

    The first line is the original sample: every weight is 1. In the others a row's weight is the number of times that
    its picture was drawn with replacement.
    """
    pictures = np.unique([item.row for item in scored], return_inverse=True)[1]
    count = int(pictures.max()) + 1
    draws = np.random.default_rng(seed).multinomial(count, [1 / count] * count, RESAMPLES)
    return np.vstack([np.ones((1, count)), draws]).astype(np.float64)[:, pictures]


def interval_from_resamples(values_S: Floats) -> Interval:
    """Compute the interval of a metric from its value on the original sample, followed by those on the resamples."""
    low, high = np.percentile(values_S[1:], [2.5, 97.5])
    return Interval(value=float(values_S[0]), low=float(low), high=float(high))


def measure(
    scored: Sequence[ScoredRow], *, further: Mapping[str, Metric] | None = None, seed: int = 0
) -> dict[str, Interval]:
    """Compute all metrics of a split, with intervals.

    `error_share` is over all rows; the metrics of the model and of the baselines are over the rows with a caption.

    Args:
        scored: rows of the split; at least one has a caption.
        further: more metrics of the rows with a caption, by name.
        seed: seed of the resampling.
    """
    failed = ratio([float(item.caption is None) for item in scored])
    with_caption = captioned(scored)
    weights_SR = draw_weights(with_caption, seed=seed)
    functions = model_metrics(with_caption) | baseline_metrics(with_caption) | dict(further or {})
    metrics = {name: interval_from_resamples(metric(weights_SR)) for name, metric in functions.items()}
    return metrics | {"error_share": interval_from_resamples(failed(draw_weights(scored, seed=seed)))}


def pair_rows(one: Sequence[ScoredRow], other: Sequence[ScoredRow]) -> tuple[list[ScoredRow], list[ScoredRow]]:
    """Return the rows that both models captioned, in the same order."""
    second = {item.key: item for item in captioned(other)}
    shared = sorted((item for item in captioned(one) if item.key in second), key=lambda item: item.key)
    return shared, [second[item.key] for item in shared]


def metric_differences(
    one: Sequence[ScoredRow], other: Sequence[ScoredRow], *, names: Sequence[str] = (), seed: int = 0
) -> dict[str, Interval]:
    """Compute each metric of `one` minus that of `other` on the rows that both captioned, by a paired bootstrap.

    Args:
        one: rows of a model.
        other: rows of another model.
        names: metrics to compute; by default all that both models have.
        seed: seed of the resampling.
    """
    first, second = pair_rows(one, other)
    if not first:
        return {}
    weights_SR = draw_weights(first, seed=seed)
    metrics, others = model_metrics(first), model_metrics(second)
    shared = [name for name in (names or metrics) if name in metrics and name in others]
    return {name: interval_from_resamples(metrics[name](weights_SR) - others[name](weights_SR)) for name in shared}


def slice_metrics(
    scored: Sequence[ScoredRow], columns: Mapping[str, Mapping[str, object]], *, names: Sequence[str], seed: int = 0
) -> dict[str, dict[str, Interval]]:
    """Compute metrics of slices of the split, by `column=value`.

    CIDEr uses the word weights of the whole split, so that its values compare between slices.

    Args:
        scored: rows of the split; at least one has a caption.
        columns: for each column name, the value of each image_id.
        names: metrics to compute.
        seed: seed of the resampling.
    """
    with_caption = captioned(scored)
    metrics = model_metrics(with_caption)
    found: dict[str, dict[str, Interval]] = {}
    for column, values in columns.items():
        labels = _labels([values.get(item.image_id) for item in with_caption])
        for label in sorted(set(labels)):
            inside = np.array([each == label for each in labels])
            if inside.all() or inside.sum() < MIN_SLICE_ROWS:
                continue
            part = [item for item, is_inside in zip(with_caption, inside, strict=True) if is_inside]
            weights_SR = np.zeros((RESAMPLES + 1, len(with_caption)))
            weights_SR[:, inside] = draw_weights(part, seed=seed)
            found[f"{column}={label}"] = {
                n: interval_from_resamples(metrics[n](weights_SR)) for n in names if n in metrics
            }
    return found


def _labels(values: Sequence[object]) -> list[str]:
    """Return a label for each value.

    More than MAX_VALUES distinct numbers become quartiles. Of other values the MAX_VALUES most frequent keep their own
    label, the rest become `other`.
    """
    numbers = [value for value in values if isinstance(value, int | float)]
    if len(numbers) == len(values) and len(set(numbers)) > MAX_VALUES:
        edges = np.unique(np.quantile(numbers, [0, 0.25, 0.5, 0.75, 1]))
        quartiles = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, len(edges) - 2)
        return [f"{edges[q]:g} to {edges[q + 1]:g}" for q in quartiles]
    counts: dict[str, int] = {}
    for value in values:
        counts[str(value)] = counts.get(str(value), 0) + 1
    frequent = set(sorted(counts, key=lambda text: (-counts[text], text))[:MAX_VALUES])
    return [str(value) if str(value) in frequent else "other" for value in values]

"""Bootstrap confidence intervals of a model's metrics, of differences between two models, and of slices of the rows.

The bootstrap resamples pictures and not rows, so all rows (prompts) of a picture are drawn together. Two models are
compared on the same resamples (paired bootstrap), so the difficulty of a picture affects both models and cancels in the
difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pipelines.driver.evaluate.baselines import baseline_metrics
from pipelines.driver.evaluate.metrics import Floats, Metric, ScoredRow, captioned, model_metrics, ratio
from pipelines.pages.page import natural_key
from vlm.config import Config

RESAMPLES = 200
MAX_VALUES = 8
"""Largest number of values of a column for which an evaluation computes separate metrics (one slice for each value).
If all values of a column are numbers, and more than MAX_VALUES of them are distinct, the numbers are divided into
quartiles. In any other column with more than MAX_VALUES distinct values, only the most frequent MAX_VALUES values have
their own slice.
"""
MIN_SLICE_ROWS = 2


class Interval(Config):
    """Value of a metric, and the 95 % bootstrap interval from the 2.5th to the 97.5th percentile of the resamples."""

    value: float
    low: float
    high: float


def draw_weights(scored: Sequence[ScoredRow], *, seed: int = 0) -> Floats:
    """Draw the weights of the rows in each resample, as an array of shape (RESAMPLES + 1, rows).

    The first line of the array is the original sample, in which every weight is 1. Each further line of the array is
    one resample, for which pictures are drawn with replacement. The weight of a row is the number of times that its
    picture was drawn.
    """
    pictures = np.unique([item.row for item in scored], return_inverse=True)[1]
    return draw_counts(int(pictures.max()) + 1, seed=seed)[:, pictures]


def draw_counts(count: int, *, seed: int = 0) -> Floats:
    """For each resample, draw how often each of `count` items occurs, as an array of shape (RESAMPLES + 1, count).

    The first line of the array is the original sample, in which each item occurs once.
    """
    draws = np.random.default_rng(seed).multinomial(count, [1 / count] * count, RESAMPLES)
    return np.vstack([np.ones((1, count)), draws]).astype(np.float64)


def interval_from_resamples(values_S: Floats) -> Interval:
    """Compute the interval of a metric from its values on the original sample (first value) and on the resamples."""
    low, high = np.percentile(values_S[1:], [2.5, 97.5])
    return Interval(value=float(values_S[0]), low=float(low), high=float(high))


def measure(
    scored: Sequence[ScoredRow], *, further: Mapping[str, Metric] | None = None, seed: int = 0
) -> dict[str, Interval]:
    """Compute all metrics of a split, with their confidence intervals.

    `error_share` is computed over all rows. All metrics except `error_share` are computed over the rows with a caption.

    Args:
        scored: rows of the split; at least one row has a caption.
        further: dict from the name of an additional metric to a function that computes the metric. The function takes
            the weights of the rows with a caption.
        seed: seed of the resampling.
    """
    failed = ratio([float(item.caption is None) for item in scored])
    with_caption = captioned(scored)
    weights_SR = draw_weights(with_caption, seed=seed)
    functions = model_metrics(with_caption) | baseline_metrics(with_caption) | dict(further or {})
    metrics = {name: interval_from_resamples(metric(weights_SR)) for name, metric in functions.items()}
    return metrics | {"error_share": interval_from_resamples(failed(draw_weights(scored, seed=seed)))}


def pair_rows(one: Sequence[ScoredRow], other: Sequence[ScoredRow]) -> tuple[list[ScoredRow], list[ScoredRow]]:
    """Return the scores of both models for the rows that both models captioned, as two lists in the same order."""
    second = {item.key: item for item in captioned(other)}
    shared = sorted((item for item in captioned(one) if item.key in second), key=lambda item: item.key)
    return shared, [second[item.key] for item in shared]


class PairedMetric(NamedTuple):
    """A metric of two models on the same rows, and the difference (first minus second)."""

    one: Interval
    other: Interval
    difference: Interval


def paired_metrics(
    one: Sequence[ScoredRow], other: Sequence[ScoredRow], *, names: Sequence[str] = (), seed: int = 0
) -> dict[str, PairedMetric]:
    """Compute the metrics of two models, and their differences, on the rows that both models captioned.

    Return an empty dict if there is no such row.

    Args:
        one: rows that the first model has scored.
        other: rows that the second model has scored.
        names: names of the metrics to compare; by default all metrics that both models have.
        seed: seed of the resampling in the paired bootstrap.
    """
    first, second = pair_rows(one, other)
    if not first:
        return {}
    weights_SR = draw_weights(first, seed=seed)
    metrics, others = model_metrics(first), model_metrics(second)
    found = {}
    for name in names or metrics:
        if name in metrics and name in others:
            values_S, others_S = metrics[name](weights_SR), others[name](weights_SR)
            found[name] = PairedMetric(*map(interval_from_resamples, (values_S, others_S, values_S - others_S)))
    return found


def metric_differences(
    one: Sequence[ScoredRow], other: Sequence[ScoredRow], *, names: Sequence[str] = (), seed: int = 0
) -> dict[str, Interval]:
    """Compute the metric differences of two models (`one` minus `other`), as in `paired_metrics`."""
    return {name: metric.difference for name, metric in paired_metrics(one, other, names=names, seed=seed).items()}


def slice_metrics(
    scored: Sequence[ScoredRow], columns: Mapping[str, Sequence[object]], *, names: Sequence[str], seed: int = 0
) -> dict[str, dict[str, Interval]]:
    """Compute metrics of each slice of the split. The key of a slice is `column=value`.

    CIDEr uses the word weights of the whole split, so that the CIDEr values of different slices can be compared.

    Args:
        scored: rows of the split; at least one row has a caption.
        columns: dict from the name of a column to a list. The list has one value for each row with a caption, and the
            value selects the slice of the row.
        names: names of the metrics to compute.
        seed: seed of the resampling.
    """
    with_caption = captioned(scored)
    metrics = model_metrics(with_caption)
    found: dict[str, dict[str, Interval]] = {}
    for name, inside in slices_of(columns).items():
        part = [item for item, is_inside in zip(with_caption, inside, strict=True) if is_inside]
        weights_SR = np.zeros((RESAMPLES + 1, len(with_caption)))
        weights_SR[:, inside] = draw_weights(part, seed=seed)
        found[name] = {n: interval_from_resamples(metrics[n](weights_SR)) for n in names if n in metrics}
    return found


def slices_of(
    columns: Mapping[str, Sequence[object]],
) -> dict[str, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    """For each slice (`column=value`) of at least MIN_SLICE_ROWS rows, return a Boolean array that selects its rows.

    The slices of a column are sorted by value. A slice that contains all rows is left out.
    """
    found = {}
    for column, values in columns.items():
        labels = _labels(values)
        for label in sorted(set(labels), key=natural_key):
            inside = np.array([each == label for each in labels])
            if not inside.all() and inside.sum() >= MIN_SLICE_ROWS:
                found[f"{column}={label}"] = inside
    return found


def _labels(values: Sequence[object]) -> list[str]:
    """Return the slice label of each value.

    If all values are numbers, and more than MAX_VALUES of them are distinct, the labels are the ranges of the
    quartiles. In all other columns the MAX_VALUES most frequent values keep their own label, and all other values get
    the label `other`.
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

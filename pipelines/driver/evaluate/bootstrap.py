"""How sure a figure is: resampling pictures, for one model, for two on the same rows, and for a slice of the rows.

Pictures are drawn, not rows: questions about one picture come and go together. Two models are compared under the same
draws (a paired bootstrap), so what is hard about a picture is hard for both and cancels.
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
"""A column with more numbers than that is cut into quarters."""
MIN_SLICE_ROWS = 2


class Interval(Config):
    """A figure and the 2.5th and 97.5th percentile of its bootstrap over pictures."""

    value: float
    low: float
    high: float


def draw_weights(scored: Sequence[ScoredRow], *, seed: int = 0) -> Floats:
    """How often each row counts, (RESAMPLES + 1, rows): once each, then as its picture is drawn with replacement."""
    pictures = np.unique([item.row for item in scored], return_inverse=True)[1]
    count = int(pictures.max()) + 1
    draws = np.random.default_rng(seed).multinomial(count, [1 / count] * count, RESAMPLES)
    return np.vstack([np.ones((1, count)), draws]).astype(np.float64)[:, pictures]


def interval_of(values_S: Floats) -> Interval:
    """From a value followed by its resamples."""
    low, high = np.percentile(values_S[1:], [2.5, 97.5])
    return Interval(value=float(values_S[0]), low=float(low), high=float(high))


def measure(
    scored: Sequence[ScoredRow], *, further: Mapping[str, Metric] | None = None, seed: int = 0
) -> dict[str, Interval]:
    """All metrics of a split: `error_share`, and of the captioned rows those of the model and of the baselines.

    Args:
        scored: at least one has a caption.
        further: more metrics of the rows that have a caption, by name.
        seed: of the resampling.
    """
    failed = ratio([float(item.caption is None) for item in scored])
    good = captioned(scored)
    weights_SR = draw_weights(good, seed=seed)
    functions = model_metrics(good) | baseline_metrics(good) | dict(further or {})
    metrics = {name: interval_of(metric(weights_SR)) for name, metric in functions.items()}
    return metrics | {"error_share": interval_of(failed(draw_weights(scored, seed=seed)))}


def paired(one: Sequence[ScoredRow], other: Sequence[ScoredRow]) -> tuple[list[ScoredRow], list[ScoredRow]]:
    """The rows that both captioned, in the same order."""
    second = {item.key: item for item in captioned(other)}
    shared = sorted((item for item in captioned(one) if item.key in second), key=lambda item: item.key)
    return shared, [second[item.key] for item in shared]


def differences(
    one: Sequence[ScoredRow], other: Sequence[ScoredRow], *, names: Sequence[str] = (), seed: int = 0
) -> dict[str, Interval]:
    """Each metric of `one` minus that of `other` on the rows that both captioned, under the same draws.

    Args:
        one: scores of a model.
        other: scores of another.
        names: metrics wanted; all that both have without any.
        seed: of the resampling.
    """
    first, second = paired(one, other)
    if not first:
        return {}
    weights_SR = draw_weights(first, seed=seed)
    mine, theirs = model_metrics(first), model_metrics(second)
    wanted = [name for name in (names or mine) if name in mine and name in theirs]
    return {name: interval_of(mine[name](weights_SR) - theirs[name](weights_SR)) for name in wanted}


def slices(
    scored: Sequence[ScoredRow], columns: Mapping[str, Mapping[str, object]], *, names: Sequence[str], seed: int = 0
) -> dict[str, dict[str, Interval]]:
    """Metrics of parts of the split, by `column=value`.

    CIDEr keeps the word weights of the whole split, so that slices compare with each other.

    Args:
        scored: at least one has a caption.
        columns: by column name, the value of each image_id.
        names: metrics wanted.
        seed: of the resampling.
    """
    good = captioned(scored)
    metrics = model_metrics(good)
    found: dict[str, dict[str, Interval]] = {}
    for column, values in columns.items():
        labels = _labels([values.get(item.image_id) for item in good])
        for label in sorted(set(labels)):
            inside = np.array([own == label for own in labels])
            if inside.all() or inside.sum() < MIN_SLICE_ROWS:
                continue
            part = [item for item, is_in in zip(good, inside, strict=True) if is_in]
            weights_SR = np.zeros((RESAMPLES + 1, len(good)))
            weights_SR[:, inside] = draw_weights(part, seed=seed)
            found[f"{column}={label}"] = {n: interval_of(metrics[n](weights_SR)) for n in names if n in metrics}
    return found


def _labels(values: Sequence[object]) -> list[str]:
    """Values as words: many numbers as the quarter they are in, of many words the most frequent and `other`."""
    numbers = [value for value in values if isinstance(value, int | float)]
    if len(numbers) == len(values) and len(set(numbers)) > MAX_VALUES:
        edges = np.unique(np.quantile(numbers, [0, 0.25, 0.5, 0.75, 1]))
        places = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, len(edges) - 2)
        return [f"{edges[place]:g} to {edges[place + 1]:g}" for place in places]
    counts: dict[str, int] = {}
    for value in values:
        counts[str(value)] = counts.get(str(value), 0) + 1
    frequent = set(sorted(counts, key=lambda text: (-counts[text], text))[:MAX_VALUES])
    return [str(value) if str(value) in frequent else "other" for value in values]

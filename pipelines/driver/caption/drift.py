"""Is what is captioned still what was evaluated? Figures of a captioning beside those of its version's evaluation.

Both sides count with `pipelines.formats.caption_stats`. The version's own evaluation is the measure and not another
version's: what changed is then the pictures, and not the model.
"""

from __future__ import annotations

from collections.abc import Mapping

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from pipelines.config import DriftConfig
from pipelines.formats.tables import EVALUATIONS
from pipelines.platform import Platform
from vlm.config import Config

SHARES = ("words", "distinct_words")
"""Figures whose limit is a share of the evaluation's figure; of the others it is a difference."""
OF_ANY_PROMPT = ("error_share", "brightness", "contrast")
FIGURES = ("words", "distinct_words", "mean_logprob", *OF_ANY_PROMPT)


class Drift(Config):
    """A figure now and at the evaluation; `change` is a share or a difference, as its limit is."""

    value: float
    evaluated: float
    change: float
    limit: float
    beyond: bool


class Evaluated(Config):
    """Figures of a version's evaluation, and of how many pictures."""

    figures: dict[str, float]
    rows: int


def evaluated(
    spark: SparkSession, platform: Platform, *, model: str, version: str, source: str, split: str
) -> Evaluated:
    """Figures of a version's last evaluation on a split; none where it was not evaluated."""
    rows = (
        spark.table(platform.table(EVALUATIONS.name))
        .where((F.col("model_name") == model) & (F.col("model_version") == version) & F.col("slice").isNull())
        .where((F.col("source") == source) & (F.col("split") == split) & F.col("metric").isin(*FIGURES))
        .select("dataset_version", "metric", "value", "n")
        .collect()
    )
    newest = max((row["dataset_version"] for row in rows), default=None)
    last = [row for row in rows if row["dataset_version"] == newest]
    return Evaluated(
        figures={row["metric"]: row["value"] for row in last}, rows=min((row["n"] for row in last), default=0)
    )


def compare_figures(
    figures: Mapping[str, float], rows: int, measure: Evaluated, limits: DriftConfig, *, prompt: str
) -> dict[str, Drift]:
    """Each figure beside that of the evaluation; empty where there are too few rows on either side.

    Args:
        figures: of the rows captioned now.
        rows: how many.
        measure: the evaluation.
        limits: of the changes.
        prompt: of the captions. Answers to a question are no captions: then only pictures and errors are compared.
    """
    if min(rows, measure.rows) < limits.min_rows:
        return {}
    names = [name for name in (OF_ANY_PROMPT if prompt else FIGURES) if name in figures and name in measure.figures]
    return {name: _drift(name, figures[name], measure.figures[name], getattr(limits, name)) for name in names}


def _drift(name: str, value: float, before: float, limit: float) -> Drift:
    change = value - before
    if name in SHARES:
        change = change / before if before else float(value > 0)
    return Drift(value=value, evaluated=before, change=change, limit=limit, beyond=abs(change) > limit)

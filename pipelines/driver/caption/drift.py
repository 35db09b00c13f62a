"""Drift check: compare figures of a caption job, such as brightness, with an evaluation of the same model version.

Caption jobs and evaluations compute the figures with the same module, `pipelines.formats.caption_stats`. The caption
job and the evaluation use the same model version. If their figures differ, the cause is therefore a difference in the
pictures, the prompt, the generation settings or the precision.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from pyspark.sql import Column, SparkSession
from pyspark.sql import functions as F

from pipelines.config import DriftConfig
from pipelines.formats.tables import EVALUATIONS
from pipelines.platform import Platform
from vlm.config import Config
from vlm.text.words import TOKENISATION

logger = logging.getLogger(__name__)

RELATIVE = ("words", "distinct_words")
"""Names of the figures for which the drift limit is a relative change. All other figures have absolute limits."""
PROMPT_INDEPENDENT = ("error_share", "brightness", "contrast")
"""Names of the figures that do not depend on the prompt."""
FIGURES = ("words", "distinct_words", "mean_logprob", *PROMPT_INDEPENDENT)


class Drift(Config):
    """Comparison of one figure between a caption job and an evaluation.

    If RELATIVE contains the figure, `change` and `limit` are fractions of the evaluation's value. For all other
    figures, `change` and `limit` are absolute differences.
    """

    value: float
    evaluated: float
    change: float
    limit: float
    beyond: bool


class EvaluationFigures(Config):
    """Figures from the last evaluation of a model version, and the number of evaluated pictures (`rows`).

    If there is no evaluation, `figures` is empty and `rows` is 0.
    """

    figures: dict[str, float]
    rows: int


def read_evaluation_figures(
    spark: SparkSession,
    platform: Platform,
    *,
    model: str,
    version: str,
    of_model: Column,
    source: str,
    split: str,
    where: str,
) -> EvaluationFigures:
    """Read the figures of a model version's last evaluation on a split. Without an evaluation, return no figures.

    `where` is the run's condition `data.shards.where`. The figures are those of an evaluation with the same condition.
    Earlier releases of Lakesight did not store the condition. If no evaluation has the run's condition, this function
    therefore reads an evaluation for which no condition is stored, and logs a warning.

    The last evaluation is the evaluation with the newest time, not with the largest `dataset_version`. If the table
    `samples` was dropped or restored, an earlier evaluation may have a larger `dataset_version`.

    `of_model` is the SQL condition that identifies the model by its content (`is_of_model`). The figures in RELATIVE
    count words. An earlier version of Lakesight used different rules to split texts into words. If the evaluation used
    the rules of that version, this function leaves out the figures in RELATIVE.
    """
    rows = (
        spark.table(platform.table(EVALUATIONS.name))
        .where((F.col("model_name") == model) & (F.col("model_version") == version) & F.col("slice").isNull())
        .where(of_model)
        .where((F.col("source") == source) & (F.col("split") == split) & F.col("metric").isin(*FIGURES))
        .where(F.col("shards_where").isNull() | (F.col("shards_where") == where))
        .select("dataset_version", "metric", "value", "n", "tokenisation", "shards_where", "evaluated_at")
        .collect()
    )
    chosen = [row for row in rows if row["shards_where"] == (where or None)]
    if rows and not chosen:
        logger.warning(
            "drift is compared with an evaluation for which no data.shards.where is stored: run `lakesight evaluate` "
            "for model version %s with this release of Lakesight",
            version,
        )
        chosen = rows
    newest = max(chosen, key=lambda row: row["evaluated_at"], default=None)
    last = [row for row in chosen if newest and row["dataset_version"] == newest["dataset_version"]]
    figures = {row["metric"]: row["value"] for row in last}
    outdated = [row["metric"] for row in last if row["metric"] in RELATIVE and row["tokenisation"] != TOKENISATION]
    if outdated:
        logger.warning(
            "drift of %s is not checked, because the evaluation of model version %s used other rules to split texts "
            "into words: run `lakesight evaluate` for the model version with this release of Lakesight",
            " and ".join(sorted(outdated)),
            version,
        )
    return EvaluationFigures(
        figures={name: value for name, value in figures.items() if name not in outdated},
        rows=min((row["n"] for row in last), default=0),
    )


def compare_figures(
    figures: Mapping[str, float], rows: int, evaluation: EvaluationFigures, limits: DriftConfig, *, prompt: str
) -> dict[str, Drift]:
    """Compare each figure of a caption job with the same figure of the evaluation.

    Figures that the job or the evaluation lacks are left out. Return an empty dict if the job or the evaluation has too
    few rows.

    Args:
        figures: dict from the name of a figure, such as 'brightness', to its value in the caption job.
        rows: number of rows of the job that have a caption or an error.
        evaluation: figures of the model version's last evaluation.
        limits: minimum number of rows, and the largest allowed change of each figure.
        prompt: prompt of the caption job. If the prompt is not empty, only the figures in PROMPT_INDEPENDENT are
            compared, because an evaluation uses the prompts of its own rows.
    """
    if min(rows, evaluation.rows) < limits.min_rows:
        return {}
    names = [
        name for name in (PROMPT_INDEPENDENT if prompt else FIGURES) if name in figures and name in evaluation.figures
    ]
    return {name: _drift(name, figures[name], evaluation.figures[name], getattr(limits, name)) for name in names}


def _drift(name: str, value: float, evaluated: float, limit: float) -> Drift:
    """Compare one figure of the caption job with the same figure of the evaluation."""
    change = value - evaluated
    if name in RELATIVE:
        change = change / evaluated if evaluated else float(value > 0)
    return Drift(value=value, evaluated=evaluated, change=change, limit=limit, beyond=abs(change) > limit)

"""Evaluation of a text-only model. Metrics of a split, such as the loss per character, are written to `evaluations`.

The token file of the split is divided into windows of consecutive tokens. Executors compute the loss of each window, as
validation does during training. A second evaluation of the same model on the same texts reads the report of the first
evaluation.
"""

from __future__ import annotations

import logging
import math
import time
from functools import partial
from pathlib import Path

import numpy as np
from pyspark.sql import SparkSession

from pipelines.config import short_hash
from pipelines.driver.delta.map_in_arrow import spark_schema
from pipelines.driver.delta.spark_errors import translate_spark_errors
from pipelines.driver.delta.tables import ensure_tables
from pipelines.driver.evaluate.bootstrap import Interval, draw_counts, interval_from_resamples
from pipelines.driver.evaluate.table import merge_rows
from pipelines.driver.model_files import ModelFiles
from pipelines.executor.texts.score import SCORES, TextScoreJob, score_batches
from pipelines.formats.run_files.token_file import TokenSummary, write_tokens
from pipelines.formats.run_folder import read_json, write_json
from pipelines.formats.shards import Shards
from pipelines.formats.tables import EVALUATIONS, MODEL_DIGEST
from pipelines.platform import Platform, default_parallelism, task_cpus
from vlm import text
from vlm.config import Config

logger = logging.getLogger(__name__)

REPORT, TOKENS = "report.json", "tokens.bin"
WINDOWS_PER_TASK = 512
MAX_BLOCKS = 4096
"""The bootstrap resamples at most this many items, because the memory of the bootstrap grows with the number of
items."""


class TextEvaluationReport(Config):
    """Report on the evaluation of a text-only model on a split.

    Attributes:
        source: name of the data config.
        dataset_version: version of `texts` that last changed the source.
        scores_hash: hash of the model files and the texts; empty in a report file of an earlier Lakesight version.
        texts: number of texts of the split.
        chars: number of characters of the texts.
        metrics: metrics of the split: `loss` in nats per token, `loss_per_char` in nats per character, `bits_per_char`,
            `perplexity` per character, and `token_accuracy`. The end of a text is a token too.
        reused: whether the report was read from an earlier evaluation.
        seconds: duration of the evaluation that computed the report, in seconds.
    """

    model_name: str
    model_version: str
    run_id: str
    model_digest: str
    source: str
    split: str
    dataset_version: int
    scores_hash: str = ""
    texts: int
    chars: int
    metrics: dict[str, Interval]
    reused: bool
    seconds: float

    def values(self) -> dict[str, float]:
        """Return the values of the metrics, without the intervals."""
        return {name: interval.value for name, interval in self.metrics.items()}


def evaluate_texts(
    spark: SparkSession, platform: Platform, model: ModelFiles, shards_folder: Path
) -> TextEvaluationReport:
    """Compute the metrics of a version of a text-only model on a split, and write them to table `evaluations`.

    Raises:
        UserError: a folder contains no model or no shards.
        StageFailed: an executor failed.
    """
    started = time.monotonic()
    shards, config = Shards.open(shards_folder), model.read_config()
    request = shards.manifest.request
    identity = short_hash(model.name, model.version, model.run_id, model.digest, shards.manifest.content_hash)
    folder = platform.folder("reports") / f"{model.name}-{model.version}-{request.source}-{request.split}-{identity}"
    if (folder / REPORT).exists():
        report = read_json(folder / REPORT, TextEvaluationReport).model_copy(
            update={"reused": True, "scores_hash": identity}
        )
        merge_rows(spark, platform, _rows(report, request.where))
        return report
    ensure_tables(spark, platform)
    summary = write_tokens(folder / TOKENS, shards.texts(), text.load(model.folder / "tokenizer.json"))
    report = TextEvaluationReport(
        model_name=model.name,
        model_version=model.version,
        run_id=model.run_id,
        model_digest=model.digest,
        source=request.source,
        split=request.split,
        dataset_version=request.table_version,
        scores_hash=identity,
        texts=summary.texts,
        chars=summary.chars,
        metrics=_measure(spark, model, folder / TOKENS, summary, config.decoder.context),
        reused=False,
        seconds=round(time.monotonic() - started, 3),
    )
    merge_rows(spark, platform, _rows(report, request.where))
    write_json(folder / REPORT, report)
    return report


def _rows(report: TextEvaluationReport, where: str) -> list[dict[str, object]]:
    """Return the report as rows of table `evaluations`. `where` is the condition that selected the texts, or empty."""
    fields = set(EVALUATIONS.names) & TextEvaluationReport.model_fields.keys()
    shared = {name: getattr(report, name) for name in fields} | {MODEL_DIGEST.name: report.model_digest or None}
    shared |= {"slice": None, "n": report.texts, "tokenisation": None, "shards_where": where or None}
    return [shared | {"metric": name} | metric.model_dump() for name, metric in report.metrics.items()]


def _measure(
    spark: SparkSession, model: ModelFiles, tokens: Path, summary: TokenSummary, context: int
) -> dict[str, Interval]:
    """Score all windows on executors, and compute the metrics from the scores.

    The bootstrap resamples windows, or blocks of windows if the split has more than MAX_BLOCKS windows.
    """
    job = TextScoreJob(
        model_folder=model.folder,
        model_digest=model.digest,
        remote=model.remote,
        tokens=tokens,
        threads=task_cpus(spark),
    )
    count = summary.windows(context)
    tasks = min(count, max(default_parallelism(spark), -(-count // WINDOWS_PER_TASK)))
    with translate_spark_errors(
        "the model could not be evaluated", where=f"model {model.name} version {model.version}"
    ):
        scored = spark.range(0, count, 1, tasks).mapInArrow(partial(score_batches, job), spark_schema(SCORES))
        rows = sorted(scored.collect(), key=lambda row: row["window"])
    blocks = min(count, MAX_BLOCKS)
    block_of = np.arange(count) * blocks // count
    loss, targets, correct = (np.bincount(block_of, [row[name] for row in rows]) for name in SCORES.names[1:])
    counts_SB = draw_counts(blocks)
    per_token = counts_SB @ loss / (counts_SB @ targets)
    per_char = per_token * summary.targets / summary.chars
    figures = {
        "loss": per_token,
        "loss_per_char": per_char,
        "bits_per_char": per_char / math.log(2),
        "perplexity": np.exp(per_char),
        "token_accuracy": counts_SB @ correct / (counts_SB @ targets),
    }
    return {name: interval_from_resamples(values_S) for name, values_S in figures.items()}

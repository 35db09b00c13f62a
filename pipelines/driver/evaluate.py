"""How good is a model version? Executors caption a split and score it, the driver turns the scores into metrics.

What comes back to the driver is text and numbers, a few hundred bytes a picture; pictures come back as thumbnails, and
only those the gallery shows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyspark.sql import SparkSession

from pipelines.driver.gallery import MAX_CARDS, Card, write_html, write_png
from pipelines.driver.metrics import Interval, Scored, measure
from pipelines.driver.model import ModelFiles
from pipelines.driver.session import bounded_batches, ensure_tables
from pipelines.errors import StageFailed, UserError
from pipelines.executor.score import SCORE_SCHEMA, THUMBNAIL_SCHEMA, ScoreJob, score_batches, thumbnail_batches
from pipelines.platform import Platform
from pipelines.shards import ShardRequest, Shards
from pipelines.tables import EVALUATIONS, sql_type
from vlm.config import Config

logger = logging.getLogger(__name__)

ROWS_PER_TASK = 128


class EvaluationReport(Config):
    """What a model version is worth on a split.

    `left_out` counts picture-prompt pairs whose prompt leaves no room for a caption: no metric knows them.
    """

    model_name: str
    model_version: str
    run_id: str
    source: str
    split: str
    dataset_version: int
    pictures: int
    left_out: int
    metrics: dict[str, Interval]
    gallery: Path
    gallery_png: Path
    seconds: float

    def values(self) -> dict[str, float]:
        """Metrics without their intervals."""
        return {name: interval.value for name, interval in self.metrics.items()}


def evaluate(spark: SparkSession, platform: Platform, model: ModelFiles, shards_folder: Path) -> EvaluationReport:
    """Measure a model version on the split that a shard folder holds.

    Writes table `evaluations` (a repeated evaluation changes nothing but what differs) and the gallery. The metrics are
    those of `driver.metrics.measure`.

    Raises:
        UserError: the split is empty, or the folders do not hold what they should.
        StageFailed: no prompt of the split leaves room for a caption.
    """
    started = time.monotonic()
    model.read_config()
    ensure_tables(spark, platform)
    shards = Shards.open(shards_folder)
    request = shards.manifest.request
    if len(shards) == 0:
        raise UserError(
            "there is nothing to evaluate on",
            where=str(shards_folder),
            got=f"no picture of {request.source} is in split {request.split}",
            fix="set data.evaluate_on to another split, or give data.split.test a larger share",
        )
    everything = _score(spark, model, shards)
    scored = [Scored(**row) for row in everything if row["caption"] is not None]
    if not scored:
        raise StageFailed(
            "no caption can be made",
            where=f"{request.source}, split {request.split}",
            got="every prompt is too long for the model's context",
            fix="raise model.decoder.context, or lower model.generation.max_new_tokens, and train again",
        )
    metrics = measure(scored)
    _merge(spark, platform, _rows(model, request, metrics, len(shards)))
    gallery = platform.folder("reports") / f"{model.name}-{model.version}-{request.source}-{request.split}"
    title = f"{model.name} version {model.version} on {request.source} ({request.split})"
    about = f"{len(shards)} pictures, table version {request.table_version}; ranges are 95 % bootstrap intervals."
    cards = _cards(spark, request, scored)
    write_html(gallery / "gallery.html", title, about, metrics, cards)
    write_png(gallery / "gallery.png", title, cards)
    return EvaluationReport(
        model_name=model.name,
        model_version=model.version,
        run_id=model.run_id,
        source=request.source,
        split=request.split,
        dataset_version=request.table_version,
        pictures=len(shards),
        left_out=len(everything) - len(scored),
        metrics=metrics,
        gallery=gallery / "gallery.html",
        gallery_png=gallery / "gallery.png",
        seconds=time.monotonic() - started,
    )


def task_threads(spark: SparkSession) -> int:
    """Threads for torch in one task: the cores that Spark itself counts for it."""
    return int(spark.conf.get("spark.task.cpus", "1") or 1)


def spark_schema(schema: pa.Schema) -> str:
    """The column list of a mapInArrow result."""
    return ", ".join(f"{field.name} {sql_type(field.type)}{'' if field.nullable else ' NOT NULL'}" for field in schema)


def _score(spark: SparkSession, model: ModelFiles, shards: Shards) -> list[dict[str, Any]]:
    """Scores of all rows, in order."""
    job = ScoreJob(model_folder=str(model.folder), shards_folder=str(shards.folder), threads=task_threads(spark))
    tasks = max(spark.sparkContext.defaultParallelism, -(-len(shards) // ROWS_PER_TASK))
    rows = spark.range(0, len(shards), 1, min(tasks, len(shards)))
    table = rows.mapInArrow(partial(score_batches, job), spark_schema(SCORE_SCHEMA))
    return sorted((row.asDict() for row in table.collect()), key=lambda row: (row["row"], row["prompt"]))


def _rows(
    model: ModelFiles, request: ShardRequest, metrics: Mapping[str, Interval], pictures: int
) -> list[dict[str, Any]]:
    """Rows of table `evaluations`."""
    return [
        {
            "model_name": model.name,
            "model_version": model.version,
            "source": request.source,
            "dataset_version": request.table_version,
            "split": request.split,
            "metric": name,
            "value": metric.value,
            "low": metric.low,
            "high": metric.high,
            "n": pictures,
            "evaluated_at": datetime.now(UTC),
            "run_id": model.run_id,
        }
        for name, metric in metrics.items()
    ]


def _merge(spark: SparkSession, platform: Platform, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows; one that is in the table already with the same numbers stays as it is."""
    new = spark.createDataFrame([tuple(row[name] for name in EVALUATIONS.names) for row in rows], EVALUATIONS.ddl())
    keys = " AND ".join(f"t.{key} = s.{key}" for key in EVALUATIONS.key)
    differs = " OR ".join(f"t.{name} <> s.{name}" for name in ("value", "low", "high", "n"))
    spark.sql(
        f"MERGE INTO {platform.table(EVALUATIONS.name)} t USING {{new}} s ON {keys} "
        f"WHEN MATCHED AND ({differs}) THEN UPDATE SET * WHEN NOT MATCHED THEN INSERT *",
        new=new,
    )


def _cards(spark: SparkSession, request: ShardRequest, scored: Sequence[Scored]) -> list[Card]:
    """The first pictures of the split (shards are shuffled: a fair sample), as they were ingested."""
    shown = list({item.row: item for item in reversed(scored)}.values())[::-1][:MAX_CARDS]
    samples = spark.read.option("versionAsOf", request.table_version).table(request.table)
    wanted = samples.where(samples.image_id.isin([item.image_id for item in shown])).select("image_id", "image")
    with bounded_batches(spark):
        rows = wanted.mapInArrow(thumbnail_batches, spark_schema(THUMBNAIL_SCHEMA)).collect()
    thumbnails = {row["image_id"]: bytes(row["thumbnail"]) for row in rows}
    return [
        Card(
            image_id=item.image_id,
            thumbnail=thumbnails[item.image_id],
            prompt=item.prompt,
            human=" / ".join(item.references),
            caption=item.caption,
            exact=item.exact,
        )
        for item in shown
    ]

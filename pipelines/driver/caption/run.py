"""Captions for the rows of a Delta table that this model version has not captioned yet.

Pictures go from the table to the executors and nowhere else. The plan is: merge what an earlier job left in files,
count what is missing by id alone (no picture is read), stop when that is nothing, else read the missing pictures once
and caption them into files (`executor.caption`), and merge these (`driver.staged`).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, NamedTuple

from delta.tables import DeltaTable
from pydantic import Field
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.config import LimitsConfig, short_hash
from pipelines.driver.caption.drift import Drift
from pipelines.driver.caption.pending_files import Staged, of_key
from pipelines.driver.caption.source_table import Pictures, files_at, open_pictures
from pipelines.driver.delta.executors import spark_schema, task_threads
from pipelines.driver.delta.failures import spark_failures
from pipelines.driver.delta.retry import undisturbed
from pipelines.driver.delta.settings import bounded_batches
from pipelines.driver.delta.tables import ensure_tables
from pipelines.driver.model_files import ModelFiles
from pipelines.errors import StageFailed, UserError
from pipelines.executor.caption import DONE, CaptionJob, caption_batches
from pipelines.formats.caption_stats import Tally, total
from pipelines.formats.tables import GENERATED_CAPTIONS
from pipelines.platform import Platform
from vlm import text
from vlm.config import Config, GenerationConfig, Precision
from vlm.text.prompt import prefix_ids

logger = logging.getLogger(__name__)

ROWS_PER_TASK = 512


class CaptionRequest(Config):
    """What to caption, and how.

    Attributes:
        source_table: a Delta table: `table` (of the platform's own schema), `schema.table`, `catalog.schema.table`, or
            delta.`/path`.
        source_version: of that table; None means the newest.
        id_column: its values are unique and not null.
        image_column: pictures, as binary or as base64 text: the column's type says which.
        prompt: empty for a plain caption.
        where: SQL condition on the table's columns; empty for all rows.
        settings: how to decode; None means as the model's own config says.
        precision: what the model computes in.
        limits: what a picture may be; one beyond becomes a row with an error.
        retry_errors: try rows again that have an error.
        remove_deleted: remove captions of rows that the table no longer has, of every model.
        max_error_share: of the rows looked at now; beyond it the job fails, after everything is written.
    """

    source_table: str = "samples"
    source_version: int | None = None
    id_column: str = "image_id"
    image_column: str = "image"
    prompt: str = ""
    where: str = ""
    settings: GenerationConfig | None = None
    precision: Precision = Precision.FP32
    limits: LimitsConfig = LimitsConfig()
    retry_errors: bool = False
    remove_deleted: bool = False
    max_error_share: Annotated[float, Field(ge=0, le=1)] = 1.0


class CaptionReport(Config):
    """What a captioning job did: considered = already + captioned + errors.

    Attributes:
        already: rows whose picture had a caption or an error, those found in files of an earlier job included.
        changed: of the captioned and errors, rows whose picture was another before.
        recovered: captions in files that an earlier job had left, merged first.
        removed: captions of rows that the table no longer has.
        figures: of what was captioned now, as in `Tally.figures`.
        drift: by figure, how it lies beside that of the version's evaluation; empty where they were not compared.
    """

    source_table: str
    source_version: int
    model_name: str
    model_version: str
    settings_hash: str
    considered: int
    already: int
    captioned: int
    errors: int
    changed: int
    recovered: int
    removed: int
    figures: dict[str, float]
    drift: dict[str, Drift] = Field(default_factory=dict)
    seconds: float


class TooManyErrors(StageFailed):
    """More pictures could not be captioned than `max_error_share` allows. Everything is written, as `report` says."""

    def __init__(self, report: CaptionReport, max_error_share: float) -> None:
        self.report = report
        tried = report.captioned + report.errors
        super().__init__(
            "too many pictures could not be captioned",
            where=f"{report.source_table} version {report.source_version}",
            got=f"{report.errors} of {tried} rows ({report.errors / tried:.1%}, allowed are {max_error_share:.1%})",
            fix="everything is written: look at `error` in generated_captions, mend the cause, and try these rows "
            "again with --retry-errors",
        )


Watch = Callable[[Callable[[], int], int], AbstractContextManager[None]]
"""Given what counts rows done, and how many there are to do: shows it for as long as its block runs."""


def caption(
    spark: SparkSession,
    platform: Platform,
    model: ModelFiles,
    request: CaptionRequest,
    watch: Watch = lambda count, total: nullcontext(),
) -> CaptionReport:
    """Caption the rows that `generated_captions` does not have for this model version and these settings.

    A row whose picture has changed since is captioned again. A row whose picture cannot be used is written too, with
    its error, and not tried again unless asked. When there is nothing to do, nothing is written.

    Raises:
        UserError: no such table, version or column, a condition that is not SQL, ids that are not unique, a prompt
            that leaves no room for a caption, or a precision that needs a library that is not installed.
        StageFailed: Spark failed; the next job goes on where this one ended.
        TooManyErrors: more errors than `max_error_share` allows; everything is written then.
    """
    started = time.monotonic()
    request.precision.require()
    _check_prompt(model, request)
    ensure_tables(spark, platform)
    columns = (request.id_column, request.image_column)
    pictures = open_pictures(
        spark, platform, request.source_table, request.source_version, columns=columns, where=request.where
    )
    job, key = _job(spark, platform, model, request, pictures)
    staged = Staged(job.staging, key)
    staged.open()
    with spark_failures("the table could not be captioned", where=pictures.name):
        recovered = staged.merge(spark, platform)
        todo, counts = _plan(spark, platform, pictures, key, request)
        done = Tally()
        if counts.todo:
            with watch(staged.num_rows, counts.todo):
                done = _run(spark, todo, counts.todo, job)
            staged.merge(spark, platform)
        removed = _remove_deleted(spark, platform, pictures) if request.remove_deleted else 0
    report = CaptionReport(
        **key,
        source_version=pictures.version,
        considered=counts.rows,
        already=counts.rows - done.captioned - done.errors,
        captioned=done.captioned,
        errors=done.errors,
        changed=done.changed,
        recovered=recovered,
        removed=removed,
        figures=done.figures(),
        seconds=time.monotonic() - started,
    )
    return _checked(report, request)


def _job(
    spark: SparkSession, platform: Platform, model: ModelFiles, request: CaptionRequest, pictures: Pictures
) -> tuple[CaptionJob, dict[str, str]]:
    """What executors are told, and what of it every row's key has."""
    settings = request.settings or model.read_config().generation
    told = settings.model_dump() | {"precision": request.precision}
    key = {
        "source_table": pictures.name,
        "model_name": model.name,
        "model_version": model.version,
        "settings_hash": short_hash(request.prompt, told),
    }
    constants = {"prompt": request.prompt, "settings": json.dumps(told), "source_version": pictures.version}
    job = CaptionJob(
        model_folder=model.folder,
        remote=model.remote,
        precision=request.precision,
        prompt=request.prompt,
        settings=settings,
        limits=request.limits,
        threads=task_threads(spark),
        staging=(platform.folder("staged") / f"captions-{short_hash(key)}").absolute(),
        rows=ROWS_PER_TASK,
        constants=key | constants | {"run_id": model.run_id},
        at=datetime.now(UTC),
    )
    return job, key


def _checked(report: CaptionReport, request: CaptionRequest) -> CaptionReport:
    if report.errors > request.max_error_share * (report.captioned + report.errors):
        raise TooManyErrors(report, request.max_error_share)
    return report


class Counts(NamedTuple):
    """Rows, and rows to look at: those without a caption, and those that may have another picture now."""

    rows: int
    todo: int


def _plan(
    spark: SparkSession, platform: Platform, pictures: Pictures, key: dict[str, str], request: CaptionRequest
) -> tuple[DataFrame, Counts]:
    """Rows to look at (image_id, image, known), and how many; counted by ids alone, so that no picture is read."""
    table = spark.table(platform.table(GENERATED_CAPTIONS.name)).alias("there").where(of_key(key))
    there = table.where("error IS NULL") if request.retry_errors else table
    done = there.select("image_id", "sha256", "source_version", F.lit(True).alias("is_there"))
    kept = _kept_files(spark, pictures, done)
    marked = pictures.rows.join(done, "image_id", "left").join(F.broadcast(kept), ["source_version", "file"], "left")
    same = (F.col("source_version") == pictures.version) | F.col("is_kept")
    suspect = F.col("is_there") & ~F.coalesce(same, F.lit(False))
    marked = marked.withColumn("suspect", F.coalesce(suspect, F.lit(False)))
    counts = marked.agg(
        F.count("*").alias("rows"),
        F.count("image_id").alias("ids"),
        F.countDistinct("image_id").alias("distinct"),
        F.count_if(F.expr("is_there IS NULL OR suspect")).alias("todo"),
    ).head()
    assert counts is not None
    if not counts["rows"] == counts["ids"] == counts["distinct"]:
        raise UserError(
            "the ids do not tell the rows apart",
            where=f"column {request.id_column} of table {pictures.name}",
            got=f"{counts['rows']} rows, {counts['ids']} ids that are not null, {counts['distinct']} distinct ones",
            fix="name a column whose values are unique, or leave rows out with a condition",
        )
    todo = marked.where("is_there IS NULL OR suspect").select("image_id", "image", F.col("sha256").alias("known"))
    return todo, Counts(counts["rows"], counts["todo"])


def _kept_files(spark: SparkSession, pictures: Pictures, done: DataFrame) -> DataFrame:
    """Columns source_version, file, is_kept: files that the table has now and had at the versions captioned before."""
    seen = [row[0] for row in done.select("source_version").distinct().collect() if row[0] != pictures.version]
    now = files_at(spark, pictures.name, pictures.version) if seen else set()
    pairs = [(version, file, True) for version in seen for file in now & files_at(spark, pictures.name, version)]
    return spark.createDataFrame(pairs, "source_version BIGINT, file STRING, is_kept BOOLEAN")


def _run(spark: SparkSession, todo: DataFrame, rows: int, job: CaptionJob) -> Tally:
    """Caption the rows into files; returns what they count for."""
    # A small table is one file and would be one task: spread it. By id, so that a retried task gets the same rows.
    # In whole rounds: three tasks on two cores take as long as four.
    cores = spark.sparkContext.defaultParallelism
    tasks = cores * -(-rows // (job.rows * cores))
    with bounded_batches(spark):
        written = (
            todo.repartition(min(tasks, rows), "image_id")
            .mapInArrow(partial(caption_batches, job), spark_schema(DONE))
            .collect()
        )
    return total(Tally.model_validate_json(row["tally"]) for row in written)


def _remove_deleted(spark: SparkSession, platform: Platform, pictures: Pictures) -> int:
    """Remove captions of rows that the table does not have; returns how many."""
    name = platform.table(GENERATED_CAPTIONS.name)
    gone = of_key({"source_table": pictures.name})
    merge = (
        DeltaTable.forName(spark, name)
        .alias("there")
        .merge(pictures.ids.alias("came"), gone & (F.col("there.image_id") == F.col("came.image_id")))
        .whenNotMatchedBySourceDelete(condition=gone)
    )
    return undisturbed(lambda: int(merge.execute().collect()[0]["num_deleted_rows"]), where=name)


def _check_prompt(model: ModelFiles, request: CaptionRequest) -> None:
    """Refuse here what every executor would refuse."""
    config = model.read_config()
    settings = request.settings or config.generation
    prefix = prefix_ids(text.load(model.folder / "tokenizer.json"), config.num_slots, request.prompt)
    if len(prefix) + settings.max_new_tokens > config.decoder.context:
        raise UserError(
            "the prompt leaves no room for a caption",
            where=f"model {model.name} version {model.version}",
            got=f"{len(prefix)} places for picture and prompt, and max_new_tokens {settings.max_new_tokens}",
            fix=f"shorten the prompt or lower max_new_tokens: the context is {config.decoder.context}",
        )

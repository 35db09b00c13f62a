"""Caption job: caption all rows of a Delta table for which a model version has not generated a caption yet.

1. The driver merges the files that an earlier job left (`pending_files.py`).
2. The driver counts the rows without a caption. This count reads the ids of the rows, but no pictures. If every row has
   a caption, the job skips steps 3 and 4.
3. Executors read the remaining pictures once and write their captions to files (`pipelines.executor.caption`).
4. The driver merges these files into `generated_captions`.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field
from pyspark.sql import DataFrame, SparkSession

from pipelines.config import LimitsConfig, short_hash
from pipelines.driver.caption.deleted_rows import remove_captions
from pipelines.driver.caption.drift import Drift
from pipelines.driver.caption.failed_jobs import FailedJobs, count_since
from pipelines.driver.caption.pending_files import PendingFiles
from pipelines.driver.caption.source_table import SourceTable, open_source_table
from pipelines.driver.caption.uncaptioned_rows import captions_of_model, find_uncaptioned_rows
from pipelines.driver.delta.map_in_arrow import spark_schema
from pipelines.driver.delta.row_times import later_than, newest_stored_time
from pipelines.driver.delta.settings import bounded_batches
from pipelines.driver.delta.spark_errors import translate_spark_errors
from pipelines.driver.delta.tables import ensure_champion_captions, ensure_tables
from pipelines.driver.model_files import ModelFiles
from pipelines.errors import FailedWithReport, UserError
from pipelines.executor.caption import STATS_SCHEMA, CaptionJob, caption_batches
from pipelines.executor.ingest.records.pictures.root import require_root
from pipelines.executor.ingest.storage import is_url
from pipelines.formats.caption_stats import CaptionStats, sum_stats
from pipelines.formats.tables import GENERATED_CAPTIONS
from pipelines.platform import Platform, allow_urls, default_parallelism, task_cpus
from vlm import text
from vlm.config import Config, GenerationConfig, Precision
from vlm.text.prompt import prefix_ids
from vlm.text.words import TOKENISATION

logger = logging.getLogger(__name__)

ROWS_PER_FILE = 512
"""Number of rows after which a task writes a caption file, and the approximate number of rows in a Spark task."""
MAX_TASKS = 4096
"""Largest number of tasks. If there are more cores than MAX_TASKS, the number of tasks may equal the number of cores.
Each task sends a row of statistics (about 20 kB) to the driver."""


class CaptionRequest(Config):
    """Request to caption a table: the rows to caption, and the settings with which the model captions them.

    Attributes:
        source_table: name of a Delta table, written as `table` (in the platform's own schema), `schema.table`,
            `catalog.schema.table`, or delta.`/path`.
        source_version: version of the source table, or None for the newest version.
        id_column: name of a column of unique, non-null ids.
        image_column: name of the column that holds the pictures (binary or base64 text), or the paths or URIs of the
            pictures below `image_root`.
        image_root: absolute path or URL of the folder of the pictures if the image column holds their paths or URIs, or
            None if the column holds the pictures themselves. A picture that cannot be read becomes a row with an error.
        prompt: text before the caption; an empty prompt gives a plain caption.
        where: SQL condition on the table's columns; an empty condition selects all rows.
        settings: decoding settings, or None for the decoding settings of the model's config.
        precision: number format in which the model computes, such as fp32.
        limits: limits on the size and the decoding time of a picture; a picture above a limit becomes a row with an
            error.
        retry_errors: whether all rows with an error are captioned again. If false, only rows whose picture could not be
            read are captioned again.
        remove_deleted: whether to remove the captions (by any model) of rows that the table no longer has.
        max_error_share: largest allowed share of errors among the rows of this job and of the failed jobs before it. If
            the share of errors is larger than this limit, the job writes all rows and then fails.
    """

    source_table: str = "samples"
    source_version: int | None = None
    id_column: str = "image_id"
    image_column: str = "image"
    image_root: str | None = None
    prompt: str = ""
    where: str = ""
    settings: GenerationConfig | None = None
    precision: Precision = Precision.FP32
    limits: LimitsConfig = LimitsConfig()
    retry_errors: bool = False
    remove_deleted: bool = False
    max_error_share: Annotated[float, Field(ge=0, le=1)] = 1.0

    @property
    def columns(self) -> tuple[str, str]:
        """Names of the id column and of the picture column."""
        return self.id_column, self.image_column


class CaptionReport(Config):
    """Result of a caption job. The counts add up: `considered = already + captioned + errors`.

    Attributes:
        considered: number of rows that meet the SQL condition.
        already: number of rows that already had a caption or an error, either in the table or in a file of an earlier
            job.
        captioned: number of rows that this job captioned.
        errors: number of rows that this job could not caption.
        changed: number of rows in `captioned` and `errors` whose picture has changed since an earlier job captioned the
            row.
        recovered: number of rows that were merged from files of an earlier job.
        failed_rows: number of rows in `already` that jobs of the same request have written since the last job that
            succeeded. These jobs failed or were killed, so their rows count in this job's share of errors.
        failed_errors: number of rows in `failed_rows` that have an error.
        removed: number of captions removed because the table no longer has their rows.
        figures: dict from the name of a statistic, such as 'words', to its value for the rows in `captioned` and
            `errors` (`CaptionStats.figures`).
        tokenisation: name of the rules by which the figures split captions into words.
        drift: dict from the name of a figure to its comparison with the evaluation of the model version; empty if
            nothing was compared.
        drift_of_failed: whether `drift` compares the rows of an earlier job that failed because of drift, because this
            job has too few rows.
        drift_unchecked: reason why captioned or recovered rows were not compared, or empty if there is no such reason.
    """

    source_table: str
    source_version: int
    model_name: str
    model_version: str
    settings_hash: str
    model_digest: str
    run_id: str
    considered: int
    already: int
    captioned: int
    errors: int
    changed: int
    recovered: int
    removed: int
    figures: dict[str, float]
    tokenisation: str = TOKENISATION
    failed_rows: int = 0
    failed_errors: int = 0
    drift: dict[str, Drift] = Field(default_factory=dict)
    drift_of_failed: bool = False
    drift_unchecked: str = ""
    seconds: float


class TooManyErrors(FailedWithReport):
    """The share of errors exceeds `max_error_share`.

    The results of all rows are written before the error is raised. The attribute `report` has the row counts.
    """

    def __init__(self, report: CaptionReport, max_error_share: float) -> None:
        self.report: CaptionReport = report
        errors, rows = report.errors + report.failed_errors, report.captioned + report.errors + report.failed_rows
        failed = f"; {report.failed_errors} of {report.failed_rows} in earlier jobs that failed or were killed"
        super().__init__(
            "too many pictures could not be captioned",
            where=f"{report.source_table} version {report.source_version}",
            got=f"{errors} of {rows} rows ({errors / rows:.1%}, --max-error-share is {max_error_share:.1%})"
            + (failed if report.failed_rows else ""),
            fix="all results are written: read column `error` of table generated_captions, correct the cause, and run "
            "the command again with --retry-errors; or accept the errors: run the command once with a larger "
            "--max-error-share",
        )


CaptionIdentity = tuple[GenerationConfig, dict[str, object], dict[str, str]]
"""Tuple of the decoding settings, the values that identify these settings, and the key of a table's caption files."""
Progress = Callable[[Callable[[], int], int], AbstractContextManager[None]]
"""Function that returns a context manager for showing progress. The first argument is a function that returns the
number of finished rows. The second argument is the number of all rows."""


def caption(
    spark: SparkSession,
    platform: Platform,
    model: ModelFiles,
    request: CaptionRequest,
    progress: Progress = lambda count, total: nullcontext(),
) -> CaptionReport:
    """Caption the rows for which `generated_captions` has no caption by this model version with these settings.

    A row whose picture has changed in the table is captioned again. A row whose picture cannot be decoded is written
    with its error. With `retry_errors`, rows with an error are captioned again. A row whose picture could not be read
    is captioned again by each job. `progress` shows the progress.

    Raises:
        UserError: the table, the version, a column or the folder of the pictures does not exist, the condition is not
            valid SQL, the ids are not unique, the prompt is too long, or a library is missing.
        StageFailed: Spark failed, or captions of an empty table were to be removed. The next job skips finished rows.
        TooManyErrors: the share of errors is larger than `max_error_share`. The share also counts the rows of failed
            and killed jobs of the same request since the last success. All results are written first.
    """
    started = time.monotonic()
    check_request(model, request)
    ensure_tables(spark, platform)
    ensure_champion_captions(spark, platform)
    source = _open_source(spark, platform, request)
    *_, key = identity = caption_key(model, request, source.name)
    pending = PendingFiles(pending_folder(platform, key), key, request.columns)
    pending.open()
    failed = failed_jobs(platform, model, request, source.name)
    captions = partial(captions_of_model, spark, platform, key, request.columns, model)
    with translate_spark_errors("the table could not be captioned", where=source.name):
        recovered = pending.merge(spark, platform)
        todo, counts = find_uncaptioned_rows(captions(), source, request.id_column, retry_errors=request.retry_errors)
        done, started_at = CaptionStats(), None
        if counts.todo:
            job = _create_job(spark, platform, model, request, source, identity=identity)
            failed.open(started_at := job.started_at)
            with progress(pending.num_rows, counts.todo):
                done = _run_executors(spark, todo, counts.todo, job)
            pending.merge(spark, platform)
        removed = remove_captions(spark, platform, source, request.id_column) if request.remove_deleted else 0
        failed_counts = count_since(captions(), source, failed.since(), started_at)
    report = CaptionReport(
        **key,
        model_digest=model.digest,
        run_id=model.run_id,
        source_version=source.version,
        considered=counts.rows,
        already=counts.rows - done.captioned - done.errors,
        **done.model_dump(include={"captioned", "errors", "changed"}),
        recovered=recovered,
        removed=removed,
        **failed_counts,
        figures=done.figures(),
        seconds=time.monotonic() - started,
    )
    _check_errors(report, request.max_error_share)
    failed.close()
    return report


def _check_errors(report: CaptionReport, max_error_share: float) -> None:
    """Check that the share of errors is small enough in the rows of this job and of the failed jobs before it.

    Raises:
        TooManyErrors: the share of rows with an error is larger than `max_error_share`.
    """
    rows = report.captioned + report.errors + report.failed_rows
    if report.errors + report.failed_errors > max_error_share * rows:
        raise TooManyErrors(report, max_error_share)


def _open_source(spark: SparkSession, platform: Platform, request: CaptionRequest) -> SourceTable:
    if is_url(request.image_root or ""):
        allow_urls(spark)
    return open_source_table(
        spark,
        platform,
        request.source_table,
        request.source_version,
        columns=request.columns,
        where=request.where,
        image_root=request.image_root,
    )


def _create_job(
    spark: SparkSession,
    platform: Platform,
    model: ModelFiles,
    request: CaptionRequest,
    source: SourceTable,
    *,
    identity: CaptionIdentity,
) -> CaptionJob:
    """Return the caption job with the settings that executors need. The time of the job is later than the time of every
    caption that any version of the model has generated for the table. So the captions of this job are the newest, even
    if the clock was set back.
    """
    settings, decoding, key = identity
    of_model = {"source_table": source.name, "model_name": model.name}
    constants = {
        "prompt": request.prompt,
        "settings": json.dumps(decoding),
        "source_version": source.version,
        "source_commit": source.commit,
        "id_column": request.id_column,
        "image_column": request.image_column,
        "image_root": request.image_root,
    }
    return CaptionJob(
        model_folder=model.folder,
        model_digest=model.digest,
        remote=model.remote,
        precision=request.precision,
        prompt=request.prompt,
        settings=settings,
        limits=request.limits,
        image_root=request.image_root,
        threads=task_cpus(spark),
        output_folder=pending_folder(platform, key),
        rows_per_file=ROWS_PER_FILE,
        constants=key | constants | {"run_id": model.run_id, "model_digest": model.digest or None},
        started_at=later_than(newest_stored_time(spark, platform, GENERATED_CAPTIONS, "captioned_at", of_model)),
    )


def caption_key(model: ModelFiles, request: CaptionRequest, table: str) -> CaptionIdentity:
    """Return the decoding settings, the values that identify these settings, and the key of the table's caption files.

    The model's digest is not in the key, because the folder of the files must keep the name that the folder had in
    Lakesight 0.1.0. Each row of a caption file has the digest of its own model.
    """
    settings = request.settings or model.read_config().generation
    decoding = settings.hashed_settings() | {"precision": request.precision}
    key = {
        "source_table": table,
        "model_name": model.name,
        "model_version": model.version,
        "settings_hash": short_hash(request.prompt, decoding),
    }
    return settings, decoding, key


def pending_folder(platform: Platform, key: dict[str, str]) -> Path:
    """Return the folder of the caption files that belong to a key."""
    return (platform.folder("staged") / f"captions-{short_hash(key)}").absolute()


def failed_jobs(platform: Platform, model: ModelFiles, request: CaptionRequest, table: str) -> FailedJobs:
    """Return the record of the failed jobs of a request. `table` is the full name of the request's table."""
    *_, key = caption_key(model, request, table)
    selection = short_hash(request.columns, request.image_root, request.where, model.digest or model.run_id)
    return FailedJobs(pending_folder(platform, key), selection)


def _run_executors(spark: SparkSession, todo: DataFrame, rows: int, job: CaptionJob) -> CaptionStats:
    """Caption rows on executors, which write the captions to files. Return the statistics of the captioned rows."""
    # The rows are repartitioned, because Spark would read a table with a single data file in a single task. The rows
    # are repartitioned by id, so that a retried task gets the same rows.
    tasks = count_tasks(rows, job.rows_per_file, default_parallelism(spark))
    with bounded_batches(spark):
        written = (
            todo.repartition(tasks, "image_id")
            .mapInArrow(partial(caption_batches, job), spark_schema(STATS_SCHEMA))
            .collect()
        )
    return sum_stats(CaptionStats.model_validate_json(row["stats"]) for row in written)


def count_tasks(rows: int, rows_per_file: int, cores: int) -> int:
    """Return the number of tasks that caption `rows` rows.

    A task writes about one file, so that a retry repeats little work. If there are enough rows, the number of tasks is
    a multiple of the number of cores, because three tasks on two cores take as long as four tasks. The number of tasks
    is limited (MAX_TASKS), because the driver receives the statistics of each task.
    """
    tasks_per_core = min(-(-rows // (rows_per_file * cores)), max(1, MAX_TASKS // cores))
    return min(rows, cores * tasks_per_core)


def check_request(model: ModelFiles, request: CaptionRequest) -> None:
    """Before Spark starts, check the parts of a request that do not depend on the table.

    Raises:
        UserError: the prompt leaves no space for a caption, the folder of the pictures cannot be read, or the library
            for the precision is not installed.
    """
    request.precision.require()
    if request.image_root is not None:
        require_root(request.image_root)
    config = model.read_config()
    settings = request.settings or config.generation
    prefix = prefix_ids(text.load(model.folder / "tokenizer.json"), config.num_slots, request.prompt)
    if len(prefix) + settings.max_new_tokens > config.decoder.context:
        raise UserError(
            "the prompt leaves no room for a caption",
            where=f"model {model.name} version {model.version}",
            got=f"{len(prefix)} positions for picture and prompt, and max_new_tokens {settings.max_new_tokens}",
            fix=f"shorten the prompt or lower max_new_tokens: the context has {config.decoder.context} positions",
        )

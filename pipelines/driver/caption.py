"""Captions for the rows of a Delta table that this model version has not captioned yet.

Pictures go from the table to the executors and nowhere else. The plan is: count what is missing by id alone (no picture
is read), stop when that is nothing, else read the missing pictures once, caption them once, and MERGE the captions.
Captions are persisted before the MERGE, because Spark would otherwise run the model again for each look at them.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial

from pyspark import StorageLevel
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import BinaryType, StringType

from pipelines.config import LimitsConfig, short_hash
from pipelines.driver.evaluate import spark_schema, task_threads
from pipelines.driver.model import ModelFiles
from pipelines.driver.session import bounded_batches, ensure_tables
from pipelines.errors import UserError
from pipelines.executor.caption import CAPTION_SCHEMA, CaptionJob, caption_batches
from pipelines.platform import Platform
from pipelines.tables import GENERATED_CAPTIONS
from vlm import text
from vlm.config import Config, GenerationConfig, Precision
from vlm.text.prompt import prefix_ids

logger = logging.getLogger(__name__)

ROWS_PER_TASK = 512
TABLE_NAME = re.compile(r"([A-Za-z_]\w*\.){0,2}[A-Za-z_]\w*|delta\.`[^`]+`")


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


class CaptionReport(Config):
    """What a captioning job did: considered = already + captioned + errors."""

    source_table: str
    source_version: int
    model_name: str
    model_version: str
    settings_hash: str
    considered: int
    already: int
    captioned: int
    errors: int
    seconds: float


def caption(spark: SparkSession, platform: Platform, model: ModelFiles, request: CaptionRequest) -> CaptionReport:
    """Caption the rows that `generated_captions` does not have for this model version and these settings.

    A row whose picture cannot be used is written too, with its error, and not tried again. When there is nothing to do,
    nothing is written.

    Raises:
        UserError: no such table, version or column, a condition that is not SQL, ids that are not unique, a prompt
            that leaves no room for a caption, or a precision that needs a library that is not installed.
    """
    started = time.monotonic()
    settings = request.settings or model.read_config().generation
    request.precision.require()
    _check_prompt(model, request.prompt, settings)
    ensure_tables(spark, platform)
    name, version, rows = _source(spark, platform, request)
    told = settings.model_dump() | {"precision": request.precision}
    settings_hash = short_hash(request.prompt, told)
    done = _done(spark, platform, model, settings_hash, name)
    considered, missing = _count(rows, done, name, request.id_column)
    captioned = errors = 0
    if missing:
        job = CaptionJob(
            model_folder=str(model.folder),
            precision=request.precision,
            prompt=request.prompt,
            settings=settings,
            limits=request.limits,
            threads=task_threads(spark),
        )
        lineage = {
            "model_name": model.name,
            "model_version": model.version,
            "settings_hash": settings_hash,
            "prompt": request.prompt,
            "settings": json.dumps(told),
            "source_table": name,
            "source_version": version,
            "run_id": model.run_id,
        }
        todo = rows.join(done, "image_id", "left_anti")
        captioned, errors = _caption(spark, platform, todo, missing=missing, job=job, lineage=lineage)
    return CaptionReport(
        source_table=name,
        source_version=version,
        model_name=model.name,
        model_version=model.version,
        settings_hash=settings_hash,
        considered=considered,
        already=considered - missing,
        captioned=captioned,
        errors=errors,
        seconds=time.monotonic() - started,
    )


def _caption(
    spark: SparkSession,
    platform: Platform,
    todo: DataFrame,
    *,
    missing: int,
    job: CaptionJob,
    lineage: Mapping[str, object],
) -> tuple[int, int]:
    """Caption the rows and MERGE them; returns how many have a caption, and how many an error."""
    # A small table is one file and would be one task: spread it. By id, so that a retried task gets the same rows.
    tasks = max(spark.sparkContext.defaultParallelism, -(-missing // ROWS_PER_TASK))
    captions = (
        todo.repartition(min(tasks, missing), "image_id")
        .mapInArrow(partial(caption_batches, job), spark_schema(CAPTION_SCHEMA))
        .withColumns({column: F.lit(value) for column, value in lineage.items()})
        # A literal: MERGE replaces current_timestamp() before it looks for a persisted plan that equals its source,
        # finds none, and captions everything again.
        .withColumn("captioned_at", F.lit(datetime.now(UTC)))
        .select(GENERATED_CAPTIONS.names)
        .persist(StorageLevel.MEMORY_AND_DISK)
    )
    try:
        with bounded_batches(spark):
            counts = captions.agg(F.count("caption").alias("captioned"), F.count("error").alias("errors")).head()
        assert counts is not None
        keys = " AND ".join(f"t.{key} = s.{key}" for key in GENERATED_CAPTIONS.key)
        table = platform.table(GENERATED_CAPTIONS.name)
        spark.sql(f"MERGE INTO {table} t USING {{new}} s ON {keys} WHEN NOT MATCHED THEN INSERT *", new=captions)
    finally:
        captions.unpersist()
    return int(counts["captioned"]), int(counts["errors"])


def _source(spark: SparkSession, platform: Platform, request: CaptionRequest) -> tuple[str, int, DataFrame]:
    """Full name and version of the table, and its rows as image_id (string) and image (binary or base64 text)."""
    if not TABLE_NAME.fullmatch(request.source_table):
        raise UserError(
            "this is not a table name",
            where="the table to caption",
            got=request.source_table,
            fix="name it as table, schema.table, catalog.schema.table, or delta.`/path`",
        )
    name = request.source_table if "." in request.source_table else platform.table(request.source_table)
    version, table = _read(spark, platform, name, request.source_version)
    for column in (request.id_column, request.image_column):
        if column not in table.columns:
            raise UserError(
                f"table {name} has no column {column!r}",
                where=f"version {version}",
                got=column,
                fix=_nearest(column, table.columns),
            )
    image = table[request.image_column]
    kind = table.schema[request.image_column].dataType
    if not isinstance(kind, BinaryType | StringType):
        raise UserError(
            f"column {request.image_column!r} of table {name} holds no pictures",
            where=f"version {version}",
            got=f"type {kind.simpleString()}",
            fix="name a binary column of picture files, or a string column of base64 text",
        )
    try:
        rows = table.where(request.where) if request.where else table
    except AnalysisException as error:  # a ParseException is one too
        raise UserError(
            "the condition cannot be used",
            where=f"table {name}",
            got=f"{request.where} ({_first_line(error)})",
            fix=f"write SQL on its columns: {', '.join(table.columns)}",
        ) from None
    return name, version, rows.select(table[request.id_column].cast("string").alias("image_id"), image.alias("image"))


def _read(spark: SparkSession, platform: Platform, name: str, wanted: int | None) -> tuple[int, DataFrame]:
    """The table's version and rows: the version wanted, or the newest, pinned, so that a job sees one state."""
    try:
        newest = spark.sql(f"DESCRIBE HISTORY {name} LIMIT 1").head()
    except AnalysisException as error:
        own = platform.namespace
        shown = spark.sql(f"SHOW TABLES IN {own}").collect()
        tables = [f"{own}.{row['tableName']}" for row in shown if not row["isTemporary"]]
        raise UserError(
            "the table cannot be read as a Delta table",
            where=name,
            got=_first_line(error),
            fix=_nearest(name, tables),
        ) from None
    assert newest is not None
    version = int(newest["version"]) if wanted is None else wanted
    try:
        return version, spark.read.option("versionAsOf", version).table(name)
    except AnalysisException as error:
        raise UserError(
            f"table {name} cannot be read at version {version}",
            where=name,
            got=_first_line(error),
            fix=f"the newest version is {newest['version']}; DESCRIBE HISTORY lists them",
        ) from None


def _done(spark: SparkSession, platform: Platform, model: ModelFiles, settings_hash: str, source: str) -> DataFrame:
    """Ids that are captioned already, as column image_id."""
    wanted = {
        "model_name": model.name,
        "model_version": model.version,
        "settings_hash": settings_hash,
        "source_table": source,
    }
    table = spark.table(platform.table(GENERATED_CAPTIONS.name))
    for column, value in wanted.items():
        table = table.where(table[column] == value)
    return table.select("image_id")


def _count(rows: DataFrame, done: DataFrame, name: str, id_column: str) -> tuple[int, int]:
    """Rows, and rows that are not done; by ids alone, so that no picture is read."""
    marked = rows.select("image_id").join(done.withColumn("is_done", F.lit(True)), "image_id", "left")
    counts = marked.agg(
        F.count("*").alias("rows"),
        F.count("image_id").alias("ids"),
        F.countDistinct("image_id").alias("distinct"),
        F.count("is_done").alias("done"),
    ).head()
    assert counts is not None
    if not counts["rows"] == counts["ids"] == counts["distinct"]:
        raise UserError(
            "the ids do not tell the rows apart",
            where=f"column {id_column} of table {name}",
            got=f"{counts['rows']} rows, {counts['ids']} ids that are not null, {counts['distinct']} distinct ones",
            fix="name a column whose values are unique, or leave rows out with a condition",
        )
    return int(counts["rows"]), int(counts["rows"] - counts["done"])


def _check_prompt(model: ModelFiles, prompt: str, settings: GenerationConfig) -> None:
    """Refuse here what every executor would refuse."""
    config = model.read_config()
    prefix = prefix_ids(text.load(model.folder / "tokenizer.json"), config.num_slots, prompt)
    if len(prefix) + settings.max_new_tokens > config.decoder.context:
        raise UserError(
            "the prompt leaves no room for a caption",
            where=f"model {model.name} version {model.version}",
            got=f"{len(prefix)} places for picture and prompt, and max_new_tokens {settings.max_new_tokens}",
            fix=f"shorten the prompt or lower max_new_tokens: the context is {config.decoder.context}",
        )


def _nearest(name: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return (f"did you mean {close[0]!r}? " if close else "") + f"there are: {', '.join(valid)}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]

"""Ingest: a source of base64 pictures into `samples` and `quarantine`, every row accounted for.

Executors decode (`pipelines.executor.decode`); the driver plans from narrow columns and merges. Pictures never come to
the driver. Three rules make a second run, or a run after a crash, add nothing:

- ids come from content, so the same row is the same row wherever and whenever it is read;
- what is already in the tables is looked up first, and with nothing new nothing is written, not even an empty version
  (shards pinned to the last version stay found);
- refusals are merged before samples, each in one Delta commit. Killed between the two, the next run finds the refusals
  there and merges the samples.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from delta.tables import DeltaMergeBuilder, DeltaTable
from pyspark import StorageLevel
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from pipelines.config import DataConfig
from pipelines.driver.session import (
    bounded_batches,
    commit_note,
    ensure_tables,
    note_of,
    spark_failures,
    stored_as_they_are,
    versions,
)
from pipelines.driver.sources import open_source
from pipelines.errors import StageFailed, UserError
from pipelines.executor.decode import OUTCOME, Rules, decode_batches
from pipelines.platform import Platform
from pipelines.tables import QUARANTINE, SAMPLES
from vlm.config import Config

logger = logging.getLogger(__name__)


class IngestReport(Config):
    """What became of the rows: rows_in = new + merged + duplicates + quarantined.

    Attributes:
        source: name of the data config.
        ingest_id: hash of the source and its files.
        rows_in: records read.
        new: rows that brought a picture new to `samples`.
        merged: rows that brought a further text for a picture.
        duplicates: rows that brought nothing: same picture and text, or the same refused row again.
        quarantined: rows newly in `quarantine`.
        reasons: `quarantined` by reason.
        splits: pictures of this source now in `samples`, by split.
        equal_pictures_across_splits: pictures of this input with the same bytes in two splits (given by the source).
        dataset_version: the version of `samples` that last changed this source.
        seconds: how long it took.
    """

    source: str
    ingest_id: str
    rows_in: int
    new: int
    merged: int
    duplicates: int
    quarantined: int
    reasons: dict[str, int]
    splits: dict[str, int]
    equal_pictures_across_splits: int
    dataset_version: int
    seconds: float


@dataclass(frozen=True)
class _Stamp:
    """What is the same for every row that one ingest brings."""

    source: str
    ingest_id: str
    at: datetime


def ingest(spark: SparkSession, platform: Platform, source_name: str, config: DataConfig) -> IngestReport:
    """Bring a source into `samples` and `quarantine`.

    Raises:
        UserError: no such input, a missing column, no rows, or not one row that can be used (they are in `quarantine`).
        StageFailed: the rows do not add up: some were lost or doubled on the way.
    """
    started = time.monotonic()
    ensure_tables(spark, platform)
    source = open_source(spark, source_name, config)
    stamp = _Stamp(source_name, source.ingest_id, datetime.now(UTC))
    rules = Rules(source_name, config.source.columns, config.limits, config.split)
    decode, schema = partial(decode_batches, read=source.read, rules=rules), from_arrow_schema(OUTCOME)
    with (
        spark_failures("the input could not be ingested", where=config.source.path),
        bounded_batches(spark),
        commit_note(spark, note_of(source_name)),
        _kept(_numbered(source.rows.mapInArrow(decode, schema)), StorageLevel.DISK_ONLY) as outcomes,
        _kept(_plan(outcomes, _rows_of(spark, platform, SAMPLES.name, source_name))) as plan,
    ):
        totals = _totals(outcomes, plan)
        if not totals.rows_in:
            raise UserError("the input has no rows", where=config.source.path, got="a header", fix="add rows")
        logger.info("%d rows decoded in %.1f s", totals.rows_in, time.monotonic() - started)
        bad = totals.refused + totals.conflicting
        reasons = _quarantine(platform, _refusals(outcomes, plan, rules), stamp) if bad else {}
        if totals.texts:
            _merge(platform, outcomes, plan, stamp, totals)
        across = _across_splits(outcomes) if config.split.kind == "file" else 0
    splits = _rows_of(spark, platform, SAMPLES.name, source_name).groupBy("split").count().orderBy("split").collect()
    report = IngestReport(
        source=source_name,
        ingest_id=source.ingest_id,
        rows_in=totals.rows_in,
        new=totals.new,
        merged=totals.texts - totals.new,
        duplicates=totals.usable - totals.texts + bad - sum(reasons.values()),
        quarantined=sum(reasons.values()),
        reasons=reasons,
        splits={row["split"]: row["count"] for row in splits},
        equal_pictures_across_splits=across,
        dataset_version=versions(spark, platform, source_name).changed,
        seconds=round(time.monotonic() - started, 3),
    )
    return _checked(report, config, used=totals.usable)


def _numbered(outcomes: DataFrame) -> DataFrame:
    """Outcomes with a `number` each: the plan names one row of a picture by it, and no picture has to be shuffled."""
    return outcomes.withColumn("number", F.monotonically_increasing_id())


@contextmanager
def _kept(frame: DataFrame, level: StorageLevel = StorageLevel.MEMORY_AND_DISK) -> Iterator[DataFrame]:
    """Compute a frame once for all that is asked of it inside."""
    frame.persist(level)
    try:
        yield frame
    finally:
        frame.unpersist()


def _rows_of(spark: SparkSession, platform: Platform, table: str, source: str) -> DataFrame:
    return spark.table(platform.table(table)).filter(F.col("source") == source)


# ------------------------------------------------------------------------------------------------ the plan


def _plan(outcomes: DataFrame, known: DataFrame) -> DataFrame:
    """One narrow row a picture that came: what it is, what of it is new, and whether it fights over its id.

    Columns: image_id, sha256, rows, number (of one of its rows), source_row, split, fresh (texts that `samples` lacks),
    is_new, conflicting.

    Two pictures with one id: the one that `samples` has stays; if it has neither, neither is taken, because which came
    first depends on the order files are read in. A picture given to two splits is held out: test before val before
    train.
    """
    held_out = F.array(F.lit("test"), F.lit("val"), F.lit("train"))
    text = F.struct("prompt", "text")
    pictures = (
        outcomes.filter(F.col("reason").isNull())
        .groupBy("image_id", "sha256")
        .agg(
            F.count("*").alias("rows"),
            F.min("number").alias("number"),
            F.min("source_row").alias("source_row"),
            F.min_by("split", F.array_position(held_out, F.col("split"))).alias("split"),
            F.collect_set(text).alias("texts"),
        )
        .withColumn("claims", F.count("*").over(Window.partitionBy("image_id")))
    )
    known = known.select("image_id", F.col("sha256").alias("known_sha256"), F.col("texts").alias("known_texts"))
    nothing = F.array().cast("array<struct<prompt:string,text:string>>")
    return pictures.join(known, "image_id", "left").select(
        "image_id",
        "sha256",
        "rows",
        "number",
        "source_row",
        "split",
        F.array_except("texts", F.coalesce("known_texts", nothing)).alias("fresh"),
        F.col("known_sha256").isNull().alias("is_new"),
        F.coalesce(F.col("known_sha256") != F.col("sha256"), F.col("claims") > 1).alias("conflicting"),
    )


@dataclass(frozen=True)
class _Totals:
    """Numbers of rows (in; refused by an executor; of pictures that fight over an id; usable) and what is new.

    `new` counts pictures that `samples` lacks, `updated` those that get a further text, `texts` the new texts of both.
    """

    rows_in: int
    refused: int
    conflicting: int
    usable: int
    new: int
    updated: int
    texts: int


def _totals(outcomes: DataFrame, plan: DataFrame) -> _Totals:
    def total(what: str, where: str) -> Column:
        return F.expr(f"coalesce(sum({what}) FILTER (WHERE {where}), 0)")

    decoded = outcomes.agg(F.count("*").alias("rows_in"), F.count("reason").alias("refused")).collect()[0]
    planned = plan.agg(
        total("rows", "conflicting").alias("conflicting"),
        total("rows", "NOT conflicting").alias("usable"),
        total("1", "NOT conflicting AND is_new").alias("new"),
        total("1", "NOT conflicting AND NOT is_new AND size(fresh) > 0").alias("updated"),
        total("size(fresh)", "NOT conflicting").alias("texts"),
    ).collect()[0]
    return _Totals(**decoded.asDict(), **planned.asDict())


def _across_splits(outcomes: DataFrame) -> int:
    pictures = outcomes.filter(F.col("reason").isNull()).groupBy("sha256").agg(F.count_distinct("split").alias("n"))
    across = pictures.filter("n > 1").count()
    if across:
        logger.warning("%d pictures have the same bytes in two splits: the source's files say so", across)
    return across


# ------------------------------------------------------------------------------------------------ quarantine


def _refusals(outcomes: DataFrame, plan: DataFrame, rules: Rules) -> DataFrame:
    """Rows that cannot be samples, whole: those refused by an executor, and pictures that fight over an id."""
    columns = ("source_row", "payload", "stage", "reason", "detail")
    name = rules.columns.image.replace("\\", "\\\\").replace('"', '\\"')
    rest = F.expr("substring(payload, 1, length(payload) - 1)")
    encoded = F.translate(F.base64("image"), "\r\n", "")  # Spark breaks base64 into lines of 76, or not, by version
    whole = F.concat(rest, F.lit(f', "{name}": "'), encoded, F.lit('"}'))
    conflicting = (
        outcomes.filter(F.col("reason").isNull())
        .join(plan.filter("conflicting").select("image_id", "sha256"), ["image_id", "sha256"])
        .select(
            "source_row",
            whole.alias("payload"),
            F.lit("merge").alias("stage"),
            F.lit("conflicting_id").alias("reason"),
            F.concat(F.lit("another picture has the id "), "image_id").alias("detail"),
        )
    )
    return outcomes.filter(F.col("reason").isNotNull()).select(*columns).unionAll(conflicting.select(*columns))


def _quarantine(platform: Platform, refusals: DataFrame, stamp: _Stamp) -> dict[str, int]:
    """Write refusals that `quarantine` does not have yet; how many by reason.

    A row is known by its content (`source` and `source_row`): a file that grew brings its bad rows only once.
    """
    known = _rows_of(refusals.sparkSession, platform, QUARANTINE.name, stamp.source).select("source_row")
    fresh = refusals.join(known, "source_row", "left_anti").dropDuplicates(["source_row"])
    counted = fresh.groupBy("reason").count().orderBy(F.desc("count"), "reason").collect()
    reasons = {row["reason"]: row["count"] for row in counted}
    quarantined = sum(reasons.values())
    if quarantined:
        rows = fresh.select(
            F.lit(stamp.ingest_id).alias("ingest_id"),
            F.lit(stamp.source).alias("source"),
            *("source_row", "payload", "stage", "reason", "detail"),
            F.lit(stamp.at).alias("quarantined_at"),
            F.lit(None).cast("timestamp").alias("replayed_at"),
        )
        merge = _merge_into(platform.table(QUARANTINE.name), rows, "source_row", stamp.source)
        _expect(merge.whenNotMatchedInsertAll().execute(), QUARANTINE.name, inserted=quarantined, updated=0)
        logger.info("%d rows quarantined: %s", quarantined, reasons)
    return reasons


# ------------------------------------------------------------------------------------------------ samples


def _merge(platform: Platform, outcomes: DataFrame, plan: DataFrame, stamp: _Stamp, totals: _Totals) -> None:
    """Insert new pictures and add new texts to known ones, in one commit."""
    pictures = outcomes.select("number", "image", "format", "width", "height")
    rows = (
        plan.filter("NOT conflicting AND size(fresh) > 0")
        .join(pictures, "number")
        .select(
            *("image_id", "sha256", "image", "format", "width", "height"),
            F.array_sort("fresh").alias("texts"),
            "split",
            F.lit(stamp.source).alias("source"),
            "source_row",
            F.lit(stamp.ingest_id).alias("ingest_id"),
            F.lit(stamp.at).alias("ingested_at"),
        )
    )
    merge = _merge_into(platform.table(SAMPLES.name), rows, "image_id", stamp.source).whenNotMatchedInsertAll()
    if totals.updated:  # Delta merges in one pass where there is nothing to update
        both = F.expr("array_sort(array_union(known.texts, came.texts))")
        merge = merge.whenMatchedUpdate(set={"texts": both})
    with stored_as_they_are(outcomes.sparkSession):
        written = merge.execute()
    _expect(written, SAMPLES.name, inserted=totals.new, updated=totals.updated)
    logger.info("%d new pictures, %d with new texts", totals.new, totals.updated)


def _merge_into(table: str, came: DataFrame, key: str, source: str) -> DeltaMergeBuilder:
    """A merge of rows of one source. Its name as a literal lets Delta skip the files of others."""
    same = (F.col("known.source") == source) & (F.col(f"known.{key}") == F.col(f"came.{key}"))
    return DeltaTable.forName(came.sparkSession, table).alias("known").merge(came.alias("came"), same)


def _expect(metrics: DataFrame, table: str, *, inserted: int, updated: int) -> None:
    """Compare what Delta says it wrote with what was planned.

    Raises:
        StageFailed: they differ.
    """
    row = metrics.collect()[0]
    if (row["num_inserted_rows"], row["num_updated_rows"]) != (inserted, updated):
        raise StageFailed(
            "a merge did not write what was planned",
            where=f"table {table}",
            got=f"{row['num_inserted_rows']} inserted and {row['num_updated_rows']} updated, "
            f"not {inserted} and {updated}",
            fix="did another ingest of this source run at the same time? Run it again: what is there is not doubled",
        )


def _checked(report: IngestReport, config: DataConfig, *, used: int) -> IngestReport:
    """The report, if its rows add up and some of them could be used."""
    total = report.new + report.merged + report.duplicates + report.quarantined
    if total != report.rows_in:
        raise StageFailed(
            "the rows of an ingest do not add up",
            where=config.source.path,
            got=f"{report.rows_in} in; {report.new} new + {report.merged} merged + {report.duplicates} duplicates + "
            f"{report.quarantined} quarantined = {total}",
            fix="this is a defect of Lakesight: please report it with the ingest's log",
        )
    if not used:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.reasons.items())
        raise UserError(
            "not one row of the input could be used",
            where=config.source.path,
            got=f"{report.rows_in} rows, newly quarantined: {reasons or 'none, all were there before'}",
            fix="look at them with `lakesight show quarantine`; check data.source.columns",
        )
    return report

"""Ingest: a source of pictures and texts into `samples` and `quarantine`, every row accounted for.

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

from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from pipelines.config import DataConfig
from pipelines.driver.merge import Stamp, merge_samples, rows_of_source
from pipelines.driver.near import NearReport, neighbours_of, pairs_of, report_of
from pipelines.driver.plan import Totals, pictures_across_splits, plan_of, totals_of
from pipelines.driver.quarantine import quarantine, refusals_of
from pipelines.driver.session import (
    add_columns,
    bounded_batches,
    commit_note,
    ensure_tables,
    note_of,
    spark_failures,
    versions,
)
from pipelines.driver.sources import Source, open_source
from pipelines.errors import StageFailed, UserError
from pipelines.executor.decode import OUTCOME, Rules, decode_batches
from pipelines.platform import Platform
from pipelines.tables import SAMPLES
from vlm.config import Config

logger = logging.getLogger(__name__)


class IngestReport(Config):
    """What became of the rows: rows_in = new + merged + duplicates + quarantined.

    Attributes:
        source: name of the data config.
        ingest_id: hash of the source and its files.
        rows_in: records read.
        new: rows that brought a picture new to `samples`, with all their texts.
        merged: rows that brought a further text for a picture.
        duplicates: rows that brought nothing: same picture and text, or the same refused row again.
        quarantined: rows newly in `quarantine`.
        refused: rows of this input that cannot be samples, those that were in `quarantine` before included.
        reasons: `quarantined` by reason.
        splits: pictures of this source now in `samples`, by split.
        equal_pictures_across_splits: pictures of this input with the same bytes in two splits (given by the source).
        near_duplicates: new pictures that nearly equal another one of the source.
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
    refused: int
    reasons: dict[str, int]
    splits: dict[str, int]
    equal_pictures_across_splits: int
    near_duplicates: NearReport
    dataset_version: int
    seconds: float


class TooManyRefused(StageFailed):
    """More rows were refused than data.limits.max_bad_share allows. Both tables are written, as `report` says."""

    def __init__(self, report: IngestReport, where: str, max_bad_share: float) -> None:
        self.report = report
        super().__init__(
            "too many rows were refused",
            where=f"{where}, data {report.source}, ingest {report.ingest_id}",
            got=f"{report.refused} of {report.rows_in} rows ({report.refused / report.rows_in:.1%}, "
            f"data.limits.max_bad_share is {max_bad_share:.1%}); {_newly(report)}",
            fix="both tables are written: look at the bad rows with `lakesight quarantine`, mend their cause, then "
            "`lakesight quarantine replay --reason REASON`, or ingest again",
        )


def _newly(report: IngestReport) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in report.reasons.items())
    return f"newly quarantined: {reasons or 'none, all were there before'}"


@dataclass(frozen=True)
class Work:
    """Rows that were decoded and what is to become of them.

    Attributes:
        outcomes: one OUTCOME a row, and its `number`.
        plan: one row a picture (`plan.plan_of`).
        totals: of both.
        rules: what made a row a sample.
        stamp: what every row that is written carries.
    """

    outcomes: DataFrame
    plan: DataFrame
    totals: Totals
    rules: Rules
    stamp: Stamp


def ingest(spark: SparkSession, platform: Platform, source_name: str, config: DataConfig) -> IngestReport:
    """Bring a source into `samples` and `quarantine`.

    Raises:
        UserError: no such input, a missing column, no rows, or not one row that can be used (they are in `quarantine`).
        StageFailed: the rows do not add up: some were lost or doubled on the way.
        TooManyRefused: more of them than `data.limits.max_bad_share` allows; everything is written then.
    """
    started = time.monotonic()
    ensure_tables(spark, platform)
    source = open_source(spark, platform, source_name, config)
    with worked(spark, platform, source_name, config, source) as work:
        totals = work.totals
        if not totals.rows_in:
            raise UserError("the input has no rows", where=config.source.where, got="a header", fix="add rows")
        refusals = refusals_of(work.outcomes, work.plan, work.rules)
        reasons = quarantine(platform, refusals, work.stamp) if totals.bad else {}
        near = take(spark, platform, work, config)
        across = pictures_across_splits(work.outcomes) if config.split.kind != "hash" else 0
    report = IngestReport(
        source=source_name,
        ingest_id=source.ingest_id,
        rows_in=totals.rows_in,
        new=totals.new,
        merged=totals.brought - totals.new,
        duplicates=totals.usable - totals.brought + totals.bad - sum(reasons.values()),
        quarantined=sum(reasons.values()),
        refused=totals.bad,
        reasons=reasons,
        splits=splits_of(spark, platform, source_name),
        equal_pictures_across_splits=across,
        near_duplicates=near,
        dataset_version=versions(spark, platform, source_name).changed,
        seconds=round(time.monotonic() - started, 3),
    )
    return _checked(report, config)


def take(spark: SparkSession, platform: Platform, work: Work, config: DataConfig) -> NearReport:
    """Merge what the plan says is good into `samples`, near duplicates on one side of the split.

    Raises:
        StageFailed: the merge did not write what was planned.
    """
    if not work.totals.brought:
        return NearReport()
    if not (work.totals.new and config.near_duplicates):
        nobody = work.plan.withColumn("near_of", F.lit(None).cast("string"))
        merge_samples(platform, work.outcomes, nobody, work.stamp, work.totals)
        return NearReport()
    known = rows_of_source(spark, platform, SAMPLES.name, work.stamp.source)
    pairs, crowded = pairs_of(work.plan, known)
    with _kept(pairs) as pairs, _kept(neighbours_of(pairs, move=config.split.kind == "hash")) as neighbours:
        report = report_of(pairs, neighbours, crowded)
        beside = work.plan.join(neighbours.drop("split"), "image_id", "left")
        plan = beside.withColumn("split", F.coalesce("near_split", "split"))
        merge_samples(platform, work.outcomes, plan, work.stamp, work.totals)
    return report


@contextmanager
def worked(spark: SparkSession, platform: Platform, name: str, config: DataConfig, source: Source) -> Iterator[Work]:
    """Decode a source's rows and plan what becomes of them; both are kept for as long as the block runs.

    Raises:
        StageFailed: Spark failed, here or in the block.
    """
    started = time.monotonic()
    add_columns(spark, platform, SAMPLES)
    rules = Rules(name, config.source.record_columns, config.limits, config.split, config.near_duplicates)
    decode, schema = partial(decode_batches, read=source.read, rules=rules), from_arrow_schema(OUTCOME)
    with (
        spark_failures("the input could not be ingested", where=config.source.where),
        bounded_batches(spark),
        commit_note(spark, note_of(name)),
        _kept(_numbered(source.rows.mapInArrow(decode, schema)), StorageLevel.DISK_ONLY) as outcomes,
        _kept(plan_of(outcomes, rows_of_source(spark, platform, SAMPLES.name, name))) as plan,
    ):
        totals = totals_of(outcomes, plan)
        logger.info("%d rows decoded in %.1f s", totals.rows_in, time.monotonic() - started)
        yield Work(outcomes, plan, totals, rules, Stamp(name, source.ingest_id, datetime.now(UTC)))


def splits_of(spark: SparkSession, platform: Platform, source: str) -> dict[str, int]:
    """Pictures of a source in `samples`, by split."""
    counts = rows_of_source(spark, platform, SAMPLES.name, source).groupBy("split").count().orderBy("split")
    return {row["split"]: row["count"] for row in counts.collect()}


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


def _checked(report: IngestReport, config: DataConfig) -> IngestReport:
    """The report, if its rows add up and enough of them could be used."""
    total = report.new + report.merged + report.duplicates + report.quarantined
    if total != report.rows_in:
        raise StageFailed(
            "the rows of an ingest do not add up",
            where=config.source.where,
            got=f"{report.rows_in} in; {report.new} new + {report.merged} merged + {report.duplicates} duplicates + "
            f"{report.quarantined} quarantined = {total}",
            fix="this is a defect of Lakesight: please report it with the ingest's log",
        )
    if report.refused == report.rows_in:
        raise UserError(
            "not one row of the input could be used",
            where=config.source.where,
            got=f"{report.rows_in} rows, {_newly(report)}",
            fix="look at them with `lakesight quarantine`; check data.source.columns",
        )
    if report.refused > config.limits.max_bad_share * report.rows_in:
        raise TooManyRefused(report, config.source.where, config.limits.max_bad_share)
    return report

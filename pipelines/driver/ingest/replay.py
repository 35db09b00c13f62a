"""Replay of rows in `quarantine`: decode these rows again, after the cause of their refusal has been fixed.

The cause of the refusal may have been a limit, a column name or a defect in the code. A replay cannot fix a defect in
an input file. The defect must be corrected in the file. The next ingest then reads the corrected row as a new row.
Accepted rows are first written to `samples`, as in any ingest, and then marked in `quarantine`. If a replay is killed
before the rows are marked, the next replay recognizes these rows as duplicates and marks the rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.config import DataConfig, short_hash
from pipelines.driver.delta.retry import retry_on_conflict
from pipelines.driver.delta.tables import ensure_tables
from pipelines.driver.ingest.commit import write_samples
from pipelines.driver.ingest.decode import DecodedRows, IngestRequest, decode_rows
from pipelines.driver.ingest.plan import IngestPlan, PlanTotals, overfull_rows, plan_ingest
from pipelines.driver.ingest.sources.pictures import read_replayed_pictures, reads_urls
from pipelines.driver.ingest.sources.source import SourceRows
from pipelines.driver.ingest.spill import spill_folder
from pipelines.driver.ingest.table_rows import merge_into, rows_of_source, verify_merge
from pipelines.errors import UserError
from pipelines.executor.ingest.records.table import payload_records
from pipelines.formats.tables import QUARANTINE
from pipelines.platform import Platform, allow_urls
from vlm.config import Config


class ReplayReport(Config):
    """Result of a replay, with rows_in = new + merged + duplicates + the sum of `refused`.

    Attributes:
        source: name of the source, which is the name of its data config.
        reasons: quarantine reasons of the replayed rows.
        rows_in: number of replayed rows. A row is replayed if it has one of the reasons and no earlier replay has
            accepted it.
        new: number of rows that added a new picture to `samples`.
        merged: number of rows that added a text to a picture.
        duplicates: number of valid rows that added nothing.
        refused: dict from a quarantine reason to the number of rows that the replay refused again for this reason.
        seconds: duration of the replay, in seconds.
    """

    source: str
    reasons: tuple[str, ...]
    rows_in: int
    new: int
    merged: int
    duplicates: int
    refused: dict[str, int]
    seconds: float


class _Replayed(NamedTuple):
    totals: PlanTotals
    refused: dict[str, int]


def replay(
    spark: SparkSession, platform: Platform, source_name: str, config: DataConfig, reasons: Sequence[str]
) -> ReplayReport:
    """Decode rows of a source in `quarantine` again, with the current data config, and write the accepted rows.

    If a row refers to its picture by a path or URI and the picture could not be read before, the picture is read again.

    Raises:
        UserError: the location of the pictures (`image_root`) cannot be read, or the source is plain text.
        StageFailed: Spark failed.
    """
    started = time.monotonic()
    if config.source.kind == "text":
        raise UserError(
            "refused rows of plain text are not replayed",
            where=f"data {source_name}",
            got="quarantine keeps only the beginning of a long text",
            fix="change the limit and run `lakesight ingest`: with changed settings, all files are read again",
        )
    if reads_urls(config):
        allow_urls(spark)
    ensure_tables(spark, platform)
    pending = rows_of_source(spark, platform, QUARANTINE.name, source_name).filter("replayed_at IS NULL")
    rows = pending.filter(F.col("reason").isin(list(reasons))).select("source_row", "payload")
    ingest_id = short_hash(source_name, "replay", sorted(reasons), time.time_ns())
    read = read_replayed_pictures(config, payload_records)
    request = IngestRequest(source_name, config, SourceRows(rows, read), ingest_id)
    with spill_folder(platform) as spill, decode_rows(spark, platform, request, spill) as decoded:
        totals, refused = retry_on_conflict(partial(_plan_and_write, spark, platform, decoded))
    for reason, count in (("conflicting_id", totals.conflicting), ("too_many_texts", totals.overfull)):
        if count:
            refused[reason] = refused.get(reason, 0) + count
    return ReplayReport(
        source=source_name,
        reasons=tuple(reasons),
        rows_in=totals.rows_in,
        new=totals.new,
        merged=totals.contributing - totals.new,
        duplicates=totals.usable - totals.contributing,
        refused=refused,
        seconds=round(time.monotonic() - started, 3),
    )


def _plan_and_write(spark: SparkSession, platform: Platform, decoded: DecodedRows) -> _Replayed:
    plan = plan_ingest(spark, platform, decoded)
    write_samples(platform, plan)
    if plan.totals.usable:
        retry_on_conflict(partial(_mark_replayed, platform, plan))
    refused = plan.outcomes.filter(F.col("reason").isNotNull()).groupBy("reason").count().collect()
    return _Replayed(plan.totals, {row["reason"]: row["count"] for row in refused})


def _mark_replayed(platform: Platform, plan: IngestPlan) -> None:
    """Set the column `replayed_at` of the accepted rows in `quarantine` to the time of the plan."""
    accepted = _accepted_rows(plan).select("source_row", F.lit(plan.stamp.planned_at).alias("replayed_at"))
    update = "WHEN MATCHED THEN UPDATE SET replayed_at = updates.replayed_at"
    counts = merge_into(platform.table(QUARANTINE.name), accepted, "source_row", plan.stamp.source, update)
    verify_merge(counts, inserted=0, updated=plan.totals.usable)


def _accepted_rows(plan: IngestPlan) -> DataFrame:
    usable = plan.pictures.filter("NOT conflicting").select("image_id", "sha256")
    rows = plan.outcomes.filter(F.col("reason").isNull()).join(usable, ["image_id", "sha256"])
    overfull = overfull_rows(plan.outcomes, plan.pictures).select("source_row")
    return rows.join(overfull, "source_row", "left_anti") if plan.totals.overfull else rows

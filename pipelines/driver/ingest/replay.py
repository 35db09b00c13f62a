"""Replay: rows of `quarantine` once more through the checks, after what was wrong with them has been mended.

What was wrong may have been a limit, a column's name or the code; what is wrong with a file is mended in the file, and
the corrected row is a new one. Rows that are accepted now become samples as in any ingest and are marked in
`quarantine`, in this order: killed in between, the next replay finds duplicates and marks them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.config import DataConfig, short_hash
from pipelines.driver.delta.retry import undisturbed
from pipelines.driver.delta.tables import ensure_tables
from pipelines.driver.ingest.commit import expect, merge_into, rows_of_source
from pipelines.driver.ingest.decode import Task, Work, settled
from pipelines.driver.ingest.plan import Totals
from pipelines.driver.ingest.run import take
from pipelines.driver.ingest.sources import Rows
from pipelines.executor.ingest.records import payload_records
from pipelines.formats.tables import QUARANTINE
from pipelines.platform import Platform
from vlm.config import Config


class ReplayReport(Config):
    """What became of the rows: rows_in = new + merged + duplicates + the sum of `refused`.

    Attributes:
        source: name of the data config.
        reasons: of the rows that were tried.
        rows_in: rows tried: of these reasons, and not accepted before.
        new: rows that brought a picture new to `samples`.
        merged: rows that brought a further text for a picture.
        duplicates: rows that are good and brought nothing.
        refused: rows that stay in quarantine, by the reason that they would have now.
        seconds: how long it took.
    """

    source: str
    reasons: tuple[str, ...]
    rows_in: int
    new: int
    merged: int
    duplicates: int
    refused: dict[str, int]
    seconds: float


def replay(
    spark: SparkSession, platform: Platform, source_name: str, config: DataConfig, reasons: Sequence[str]
) -> ReplayReport:
    """Try a source's rows in `quarantine` again, with the data config as it is now.

    Raises:
        StageFailed: Spark failed.
    """
    started = time.monotonic()
    ensure_tables(spark, platform)
    waiting = rows_of_source(spark, platform, QUARANTINE.name, source_name).filter("replayed_at IS NULL")
    rows = waiting.filter(F.col("reason").isin(list(reasons))).select("source_row", "payload")
    ingest_id = short_hash(source_name, "replay", sorted(reasons), time.time_ns())
    task = Task(source_name, config, Rows(rows, payload_records), ingest_id)

    def act(work: Work) -> tuple[Totals, dict[str | None, int]]:
        take(platform, work, config)
        if work.totals.usable:
            undisturbed(partial(_mark, platform, work))
        refused = {row["reason"]: row["count"] for row in work.outcomes.groupBy("reason").count().collect()}
        return work.totals, refused

    totals, refused = settled(spark, platform, task, act)
    refused.pop(None, None)
    if totals.conflicting:
        refused["conflicting_id"] = refused.get("conflicting_id", 0) + totals.conflicting
    return ReplayReport(
        source=source_name,
        reasons=tuple(reasons),
        rows_in=totals.rows_in,
        new=totals.new,
        merged=totals.brought - totals.new,
        duplicates=totals.usable - totals.brought,
        refused=refused,
        seconds=round(time.monotonic() - started, 3),
    )


def _mark(platform: Platform, work: Work) -> None:
    """Note in `quarantine` when each accepted row was accepted."""
    accepted = _accepted(work).select("source_row")
    merge = merge_into(platform.table(QUARANTINE.name), accepted, "source_row", work.stamp.source)
    marked = merge.whenMatchedUpdate(set={"replayed_at": F.lit(work.stamp.at)}).execute()
    expect(marked, inserted=0, updated=work.totals.usable)


def _accepted(work: Work) -> DataFrame:
    good = work.plan.filter("NOT conflicting").select("image_id", "sha256")
    return work.outcomes.filter(F.col("reason").isNull()).join(good, ["image_id", "sha256"])

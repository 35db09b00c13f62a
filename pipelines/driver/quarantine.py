"""Quarantine: rows that cannot be samples, whole, with the reason; and a look at them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime
from functools import partial

from pyspark.sql import DataFrame, Row, SparkSession, Window
from pyspark.sql import functions as F

from pipelines.driver.merge import Stamp, merge_into, rows_of_source
from pipelines.driver.page import Card, Chart, Gallery, Page, write_page
from pipelines.driver.session import bounded_batches, ensure_tables
from pipelines.driver.work import Work
from pipelines.executor.staging import PLACE
from pipelines.executor.thumbnail import SHOWN_CHARS, with_thumbnails
from pipelines.platform import Platform
from pipelines.tables import QUARANTINE
from vlm.config import Config

logger = logging.getLogger(__name__)


def refusals_of(work: Work) -> DataFrame:
    """Rows that cannot be samples, whole: those refused by an executor, and pictures that fight over an id."""
    columns = ("source_row", "payload", "stage", "reason", "detail")
    refused = work.outcomes.filter(F.col("reason").isNotNull()).select(*columns)
    if not work.totals.conflicting:
        return refused
    name = work.rules.columns.image.replace("\\", "\\\\").replace('"', '\\"')
    rest = F.expr("substring(payload, 1, length(payload) - 1)")
    encoded = F.translate(F.base64("image"), "\r\n", "")  # Spark breaks base64 into lines of 76, or not, by version
    whole = F.concat(rest, F.lit(f', "{name}": "'), encoded, F.lit('"}'))
    rows = (
        work.outcomes.filter(F.col("reason").isNull())
        .join(work.plan.filter("conflicting").select("image_id", "sha256"), ["image_id", "sha256"])
        .select("source_row", "payload", "image_id", F.struct(*PLACE.names).alias("picture"))
    )
    conflicting = work.waiting.join(rows).select(
        "source_row",
        whole.alias("payload"),
        F.lit("merge").alias("stage"),
        F.lit("conflicting_id").alias("reason"),
        F.concat(F.lit("another picture has the id "), "image_id").alias("detail"),
    )
    return refused.unionAll(conflicting.select(*columns))


def quarantine(platform: Platform, refusals: DataFrame, stamp: Stamp) -> dict[str, int]:
    """Write refusals that `quarantine` does not have yet; how many by reason.

    A row is known by its content (`source` and `source_row`): a file that grew brings its bad rows only once.
    """
    spark = refusals.sparkSession
    known = rows_of_source(spark, platform, QUARANTINE.name, stamp.source).select("source_row")
    fresh = refusals.join(known, "source_row", "left_anti").dropDuplicates(["source_row"])
    reasons = _by_reason(fresh)
    if reasons:
        rows = _rows(fresh, stamp)
        merge = merge_into(platform.table(QUARANTINE.name), rows, "source_row", stamp.source)
        [row] = merge.whenNotMatchedInsertAll().execute().collect()
        if row["num_inserted_rows"] != sum(reasons.values()):  # others brought some meanwhile: count what is ours
            ours = F.col("quarantined_at") == stamp.at
            reasons = _by_reason(rows_of_source(spark, platform, QUARANTINE.name, stamp.source).filter(ours))
        logger.info("%d rows quarantined: %s", sum(reasons.values()), reasons)
    return reasons


def replace_quarantine(platform: Platform, refusals: DataFrame, stamp: Stamp) -> dict[str, int]:
    """Put refusals in the place of all of their source; how many by reason."""
    fresh = refusals.dropDuplicates(["source_row"])
    _rows(fresh, stamp).writeTo(platform.table(QUARANTINE.name)).overwrite(F.col("source") == stamp.source)
    return _by_reason(fresh)


def _by_reason(refusals: DataFrame) -> dict[str, int]:
    counted = refusals.groupBy("reason").count().orderBy(F.desc("count"), "reason").collect()
    return {row["reason"]: row["count"] for row in counted}


def _rows(refusals: DataFrame, stamp: Stamp) -> DataFrame:
    """Refusals as rows of `quarantine`."""
    return refusals.select(
        F.lit(stamp.ingest_id).alias("ingest_id"),
        F.lit(stamp.source).alias("source"),
        *("source_row", "payload", "stage", "reason", "detail"),
        F.lit(stamp.at).alias("quarantined_at"),
        F.lit(None).cast("timestamp").alias("replayed_at"),
    )


# ------------------------------------------------------------------------------------------------ to look at


class Refusals(Config):
    """Rows of one source that were refused for one reason: how many, how many of them a replay accepted, since when."""

    source: str
    reason: str
    rows: int
    replayed: int
    latest: datetime


class RefusedRow(Config):
    """One row of `quarantine`; of the payload its beginning."""

    source: str
    source_row: str
    reason: str
    detail: str
    payload: str


class QuarantineReport(Config):
    """What is in `quarantine`: counts by source and reason, some rows of each, and where their pictures can be seen."""

    counts: tuple[Refusals, ...]
    rows: tuple[RefusedRow, ...]
    gallery: str | None


def look_into(
    spark: SparkSession, platform: Platform, reasons: Sequence[str], rows: int, *, pictures: bool
) -> QuarantineReport:
    """Count what is in `quarantine` and show rows of each source and reason, with or without a page of their pictures.

    Args:
        spark: the session.
        platform: where tables and reports are.
        reasons: only these; all where there are none.
        rows: rows of each source and reason.
        pictures: whether to write the page.
    """
    ensure_tables(spark, platform)
    table = spark.table(platform.table(QUARANTINE.name))
    chosen = table.filter(F.col("reason").isin(list(reasons))) if reasons else table
    counted = chosen.groupBy("source", "reason").agg(
        F.count("*").alias("rows"),
        F.count("replayed_at").alias("replayed"),
        F.max("quarantined_at").alias("latest"),
    )
    counts = [Refusals(**row.asDict()) for row in counted.orderBy("source", F.desc("rows"), "reason").collect()]
    found = some_of(chosen, rows, pictures=pictures)
    page = platform.folder("reports") / "quarantine.html"
    if pictures:
        charts = [Chart("rows by source and reason", {f"{c.source}: {c.reason}": c.rows for c in counts})]
        galleries = [
            Gallery(f"{count.source}: {count.reason}", [card_of(row) for row in found if _is_of(row, count)])
            for count in counts
        ]
        about = f"{sum(count.rows for count in counts):,} rows, {platform.table(QUARANTINE.name)}"
        write_page(page, Page("Quarantine", about, charts=charts, galleries=galleries))
    shown = [RefusedRow(**{name: row[name] for name in RefusedRow.model_fields}) for row in found]
    return QuarantineReport(counts=tuple(counts), rows=tuple(shown), gallery=str(page) if pictures else None)


def some_of(table: DataFrame, rows: int, *, pictures: bool) -> list[Row]:
    """Some rows of each source and reason: source, source_row, reason, detail, payload (cut), thumbnail if asked."""
    place = F.row_number().over(Window.partitionBy("source", "reason").orderBy("source_row"))
    chosen = table.select("source", "source_row", "reason", place.alias("place")).filter(F.col("place") <= rows)
    return _shown(table.join(chosen.select("source", "source_row"), ["source", "source_row"]), pictures=pictures)


def _shown(rows: DataFrame, *, pictures: bool) -> list[Row]:
    """Rows of `quarantine` in the order of their reasons; thumbnails are made by executors."""
    names = ("source", "source_row", "reason", "detail")
    if pictures:
        schema = ", ".join(f"{name} string" for name in (*names, "payload")) + ", thumbnail binary"
        with bounded_batches(rows.sparkSession):
            made = rows.select(*names, "payload").mapInArrow(partial(with_thumbnails, column="payload"), schema)
            return made.orderBy("source", "reason", "source_row").collect()
    cut = F.substring("payload", 1, SHOWN_CHARS).alias("payload")
    return rows.select(*names, cut).orderBy("source", "reason", "source_row").collect()


def card_of(row: Row) -> Card:
    """The card of a refused row with a thumbnail."""
    return Card(row["source_row"], row["thumbnail"], [row["payload"]], f"{row['reason']}: {row['detail']}")


def _is_of(row: Row, count: Refusals) -> bool:
    return (row["source"], row["reason"]) == (count.source, count.reason)

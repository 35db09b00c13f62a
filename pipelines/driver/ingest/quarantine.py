"""Quarantine: rows that cannot be samples, whole, with the reason; and a look at them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime
from functools import partial

from pyspark.sql import Column, DataFrame, Row, SparkSession, Window
from pyspark.sql import functions as F

from pipelines.driver.delta.settings import bounded_batches, stored_as_they_are
from pipelines.driver.delta.tables import ensure_tables
from pipelines.driver.delta.versions import since, versions
from pipelines.driver.ingest.commit import expect_written, rows_of_source
from pipelines.driver.ingest.decode import Work
from pipelines.executor.ingest.spill import PLACE
from pipelines.executor.thumbnail import SHOWN_CHARS, with_thumbnails
from pipelines.formats.tables import QUARANTINE
from pipelines.pages.page import Card, CardText, Chart, Gallery, Page, write_page
from pipelines.platform import Platform
from vlm.config import Config

logger = logging.getLogger(__name__)

REFUSAL = ("source_row", "stage", "reason", "detail", "place")


def refusals_of(work: Work) -> DataFrame:
    """Rows that cannot be samples: those refused by an executor, and pictures that fight over an id.

    Columns: REFUSAL; payloads wait in files (`work.waiting`).
    """
    outcomes = work.outcomes.withColumn("place", F.struct(*PLACE.names))
    refused = outcomes.filter(F.col("reason").isNotNull()).select(*REFUSAL)
    if not work.totals.conflicting:
        return refused
    conflicting = (
        outcomes.filter(F.col("reason").isNull())
        .drop("stage", "reason", "detail")
        .join(work.plan.filter("conflicting").select("image_id", "sha256"), ["image_id", "sha256"])
        .withColumn("stage", F.lit("merge"))
        .withColumn("reason", F.lit("conflicting_id"))
        .withColumn("detail", F.concat(F.lit("another picture has the id "), "image_id"))
    )
    return refused.unionAll(conflicting.select(*REFUSAL))


def quarantine(platform: Platform, work: Work) -> dict[str, int]:
    """Write refusals that `quarantine` does not have yet, in one commit; how many by reason.

    A row is known by its content (`source` and `source_row`): a file that grew brings its bad rows only once.

    Raises:
        Overtaken: another ingest of the source brought refusals meanwhile; nothing is written then.
    """
    spark, source, table = work.plan.sparkSession, work.stamp.source, platform.table(QUARANTINE.name)
    planned = versions(spark, platform, source, QUARANTINE).changed
    known = rows_of_source(spark, platform, QUARANTINE.name, source).select("source_row")
    fresh = refusals_of(work).join(known, "source_row", "left_anti").dropDuplicates(["source_row"])
    reasons = _by_reason(fresh)
    if reasons:
        with stored_as_they_are(spark), since(spark, source, planned):
            _rows(fresh, work).writeTo(table).append()
        expect_written(spark, table, "quarantined_at", work.stamp, sum(reasons.values()))
        logger.info("%d rows quarantined: %s", sum(reasons.values()), reasons)
    return reasons


def replace_quarantine(platform: Platform, work: Work) -> dict[str, int]:
    """Put refusals in the place of all of their source; how many by reason."""
    fresh = refusals_of(work).dropDuplicates(["source_row"])
    with stored_as_they_are(work.plan.sparkSession):
        table = platform.table(QUARANTINE.name)
        _rows(fresh, work).writeTo(table).overwrite(F.col("source") == work.stamp.source)
    return _by_reason(fresh)


def _by_reason(refusals: DataFrame) -> dict[str, int]:
    counted = refusals.groupBy("reason").count().orderBy(F.desc("count"), "reason").collect()
    return {row["reason"]: row["count"] for row in counted}


def _rows(refusals: DataFrame, work: Work) -> DataFrame:
    """Refusals as rows of `quarantine`, whole."""
    fighting = work.totals.conflicting > 0
    return work.waiting.join(refusals, "payload", *(["image"] if fighting else [])).select(
        F.lit(work.stamp.ingest_id).alias("ingest_id"),
        F.lit(work.stamp.source).alias("source"),
        "source_row",
        _with_picture(work.rules.columns.image).alias("payload") if fighting else "payload",
        *("stage", "reason", "detail"),
        F.lit(work.stamp.at).alias("quarantined_at"),
        F.lit(None).cast("timestamp").alias("replayed_at"),
    )


def _with_picture(column: str) -> Column:
    """The payload; into that of a picture which fights over its id, the picture is put back."""
    name = column.replace("\\", "\\\\").replace('"', '\\"')
    rest = F.expr("substring(payload, 1, length(payload) - 1)")
    encoded = F.translate(F.base64("image"), "\r\n", "")  # Spark breaks base64 into lines of 76, or not, by version
    whole = F.concat(rest, F.lit(f', "{name}": "'), encoded, F.lit('"}'))
    return F.when(F.col("stage") == "merge", whole).otherwise(F.col("payload"))


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
    return Card(row["source_row"], row["thumbnail"], [CardText(row["payload"])], f"{row['reason']}: {row['detail']}")


def _is_of(row: Row, count: Refusals) -> bool:
    return (row["source"], row["reason"]) == (count.source, count.reason)

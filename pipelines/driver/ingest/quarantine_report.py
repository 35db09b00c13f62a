"""Report on table `quarantine`: row counts by source and reason, example rows, and a page with pictures of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import partial

from pyspark.sql import DataFrame, Row, SparkSession, Window
from pyspark.sql import functions as F

from pipelines.driver.delta.settings import bounded_batches
from pipelines.driver.delta.tables import ensure_tables
from pipelines.executor.thumbnail import SHOWN_CHARS, with_thumbnails
from pipelines.formats.tables import QUARANTINE
from pipelines.pages.page import Card, CardText, Chart, Gallery, Page, write_page
from pipelines.platform import Platform
from vlm.config import Config


class QuarantineCount(Config):
    """Number of rows in `quarantine` for one source and one quarantine reason.

    Attributes:
        source: name of the data config.
        reason: quarantine reason, one of tables.REASONS.
        rows: number of rows.
        replayed: number of rows that a replay has accepted.
        latest: time at which the newest row was quarantined.
    """

    source: str
    reason: str
    rows: int
    replayed: int
    latest: datetime


class RefusedRow(Config):
    """One row of `quarantine`; `payload` is the beginning of the row's payload."""

    source: str
    source_row: str
    reason: str
    detail: str
    payload: str


class QuarantineReport(Config):
    """Report on the contents of `quarantine`.

    Attributes:
        counts: number of rows by source and reason.
        rows: example rows of each source and reason.
        gallery: path of the page with pictures of the example rows, or None if no page was requested.
    """

    counts: tuple[QuarantineCount, ...]
    rows: tuple[RefusedRow, ...]
    gallery: str | None


def inspect_quarantine(
    spark: SparkSession, platform: Platform, reasons: Sequence[str], rows: int, *, pictures: bool
) -> QuarantineReport:
    """Count the rows of `quarantine` and select example rows of each source and reason.

    Args:
        spark: Spark session.
        platform: location of tables and reports.
        reasons: quarantine reasons to include; an empty sequence includes every reason.
        rows: number of rows to select per source and reason.
        pictures: whether to write a page with the pictures of the selected rows.
    """
    ensure_tables(spark, platform)
    table = spark.table(platform.table(QUARANTINE.name))
    included = table.filter(F.col("reason").isin(list(reasons))) if reasons else table
    grouped = included.groupBy("source", "reason").agg(
        F.count("*").alias("rows"),
        F.count("replayed_at").alias("replayed"),
        F.max("quarantined_at").alias("latest"),
    )
    counts = [QuarantineCount(**row.asDict()) for row in grouped.orderBy("source", F.desc("rows"), "reason").collect()]
    selected = select_examples(included, rows, pictures=pictures)
    page = platform.folder("reports") / "quarantine.html"
    if pictures:
        charts = [Chart("rows by source and reason", {f"{c.source}: {c.reason}": c.rows for c in counts})]
        galleries = [
            Gallery(f"{count.source}: {count.reason}", [card_of(row) for row in selected if _belongs_to(row, count)])
            for count in counts
        ]
        about = f"{sum(count.rows for count in counts):,} rows, {platform.table(QUARANTINE.name)}"
        write_page(page, Page("Quarantine", about, charts=charts, galleries=galleries))
    examples = [RefusedRow(**{name: row[name] for name in RefusedRow.model_fields}) for row in selected]
    return QuarantineReport(counts=tuple(counts), rows=tuple(examples), gallery=str(page) if pictures else None)


def select_examples(table: DataFrame, rows: int, *, pictures: bool) -> list[Row]:
    """Select up to `rows` rows of each source and reason.

    The columns are source, source_row, reason, detail, payload (only the beginning), and, with `pictures`, thumbnail.
    """
    rank = F.row_number().over(Window.partitionBy("source", "reason").orderBy("source_row"))
    chosen = table.select("source", "source_row", "reason", rank.alias("rank")).filter(F.col("rank") <= rows)
    examples = table.join(chosen.select("source", "source_row"), ["source", "source_row"])
    names = ("source", "source_row", "reason", "detail")
    if pictures:
        schema = ", ".join(f"{name} string" for name in (*names, "payload")) + ", thumbnail binary"
        with bounded_batches(table.sparkSession):
            made = examples.select(*names, "payload").mapInArrow(partial(with_thumbnails, column="payload"), schema)
            return made.orderBy("source", "reason", "source_row").collect()
    beginning = F.substring("payload", 1, SHOWN_CHARS).alias("payload")
    return examples.select(*names, beginning).orderBy("source", "reason", "source_row").collect()


def card_of(row: Row) -> Card:
    """Return the page card of a refused row that has a thumbnail."""
    return Card(row["source_row"], row["thumbnail"], [CardText(row["payload"])], f"{row['reason']}: {row['detail']}")


def _belongs_to(row: Row, count: QuarantineCount) -> bool:
    return (row["source"], row["reason"]) == (count.source, count.reason)

"""Report on table `quarantine`: row counts by source and reason, example rows, and a page with pictures of the rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipelines.executor.thumbnail import SHOWN_CHARS, with_thumbnails
from pipelines.formats.delta_files import BATCH_ROWS, is_supported, open_or_create, query, to_rows
from pipelines.formats.tables import QUARANTINE
from pipelines.pages.page import Card, CardText, Chart, Gallery, Page, write_page
from pipelines.platform import Platform
from vlm.config import Config

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, Row, SparkSession


class QuarantineCount(Config):
    """Number of rows in `quarantine` for one source and one quarantine reason.

    Attributes:
        source: name of the source, which is the name of its data config.
        reason: quarantine reason, one of tables.REASONS.
        rows: number of rows in `quarantine` for this source and reason.
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
        counts: number of rows for each source and quarantine reason.
        rows: newest example rows of each source and reason, newest first. No replay has accepted these rows.
        gallery: path of the page with pictures of the example rows, or None if no page was requested.
    """

    counts: tuple[QuarantineCount, ...]
    rows: tuple[RefusedRow, ...]
    gallery: str | None


Select = Callable[[str], pa.Table]
"""Function that runs an SQL query. In the query, {quarantine} stands for table `quarantine`."""


def open_quarantine(open_spark: Callable[[], SparkSession], platform: Platform) -> Select:
    """Return a function that queries table `quarantine`. Spark is used only if `deltalake` cannot open the table."""
    if not is_supported(platform.tables):
        return select_with_spark(open_spark(), platform)
    table = open_or_create(platform.tables / QUARANTINE.name, QUARANTINE)
    return lambda sql: query({"found": table}, sql.format(quarantine="found")).read_all()


def select_with_spark(spark: SparkSession, platform: Platform) -> Select:
    """Return a function that queries table `quarantine` with Spark."""
    from pipelines.driver.delta.settings import bounded_batches
    from pipelines.driver.delta.tables import ensure_tables

    ensure_tables(spark, platform)
    table = spark.table(platform.table(QUARANTINE.name))

    def select(sql: str) -> pa.Table:
        with bounded_batches(spark):
            return spark.sql(sql, quarantine=table).toArrow()

    return select


def inspect_quarantine(
    select: Select, platform: Platform, reasons: Sequence[str], rows: int, *, pictures: bool
) -> QuarantineReport:
    """Count the rows of `quarantine` and select the newest example rows of each source and reason.

    Rows that a replay has accepted are counted, but are no example rows.

    Args:
        select: function that runs an SQL query on the table `quarantine`.
        platform: platform that stores the tables and reports.
        reasons: quarantine reasons (of tables.REASONS) to include; an empty sequence includes every reason.
        rows: largest number of rows to select per source and reason.
        pictures: whether to write a page with the pictures of the selected rows.
    """
    included = f"reason IN ({', '.join(repr(reason) for reason in reasons)})" if reasons else "TRUE"
    counts = [QuarantineCount.model_validate(row) for row in to_rows(select(_COUNT.format(included=included)))]
    payload = "q.payload" if pictures else f"SUBSTR(q.payload, 1, {SHOWN_CHARS}) AS payload"
    examples = select(_EXAMPLES.format(included=included, rows=rows, payload=payload))
    if pictures:
        shown = with_thumbnails(iter(examples.to_batches(BATCH_ROWS)), "payload")
        examples = pa.Table.from_batches(shown, _SHOWN)
    selected = examples.to_pylist()
    page = platform.folder("reports") / "quarantine.html"
    if pictures:
        charts = [Chart("quarantined rows by source and reason", {f"{c.source}: {c.reason}": c.rows for c in counts})]
        galleries = [
            Gallery(f"{count.source}: {count.reason}", [card_of(row) for row in selected if _belongs_to(row, count)])
            for count in counts
        ]
        about = f"{sum(count.rows for count in counts):,} rows, {platform.table(QUARANTINE.name)}"
        write_page(page, Page("Quarantine", about, charts=charts, galleries=galleries))
    found = [RefusedRow(**{name: row[name] for name in RefusedRow.model_fields}) for row in selected]
    return QuarantineReport(counts=tuple(counts), rows=tuple(found), gallery=str(page) if pictures else None)


_COUNT = """
SELECT source, reason, COUNT(*) AS `rows`, COUNT(replayed_at) AS replayed, MAX(quarantined_at) AS latest
FROM {{quarantine}} WHERE {included} GROUP BY source, reason ORDER BY source, `rows` DESC, reason
"""
_EXAMPLES = """
SELECT q.source, q.source_row, q.reason, q.detail, {payload}
FROM {{quarantine}} AS q
JOIN (
  SELECT DISTINCT source, source_row FROM (
    SELECT source, source_row,
      ROW_NUMBER() OVER (PARTITION BY source, reason ORDER BY quarantined_at DESC, source_row) AS place
    FROM {{quarantine}} WHERE {included} AND replayed_at IS NULL
  ) AS ranked WHERE place <= {rows}
) AS chosen ON q.source = chosen.source AND q.source_row = chosen.source_row
WHERE {included} AND q.replayed_at IS NULL ORDER BY q.source, q.reason, q.quarantined_at DESC, q.source_row
"""
"""Queries in SQL that both Spark and DataFusion (the SQL engine for tables on a local disk) understand. _EXAMPLES ranks
the rows without reading the large payloads.
"""
_SHOWN = pa.schema(
    [pa.field(name, pa.string()) for name in ("source", "source_row", "reason", "detail", "payload")]
    + [pa.field("thumbnail", pa.binary())]
)


def select_examples(table: DataFrame, rows: int) -> list[Row]:
    """Select up to `rows` rows of each source and reason, and make thumbnails on executors.

    The columns of the result are source, source_row, reason, detail, payload (only the beginning) and thumbnail.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F
    from pyspark.sql.pandas.types import from_arrow_schema

    from pipelines.driver.delta.settings import bounded_batches

    rank = F.row_number().over(Window.partitionBy("source", "reason").orderBy("source_row"))
    chosen = table.select("source", "source_row", "reason", rank.alias("rank")).filter(F.col("rank") <= rows)
    examples = table.join(chosen.select("source", "source_row"), ["source", "source_row"])
    refused = examples.select(*(name for name in _SHOWN.names if name != "thumbnail"))
    with bounded_batches(table.sparkSession):
        made = refused.mapInArrow(partial(with_thumbnails, column="payload"), from_arrow_schema(_SHOWN))
        return made.orderBy("source", "reason", "source_row").collect()


_BASE64 = re.compile(r"([A-Za-z0-9+/_=-]{24})[A-Za-z0-9+/_=-]{40,}")
"""Pattern of a picture's base64 text. A card shows only the beginning of a base64 text, because people cannot read
base64."""


def card_of(row: Row | dict[str, Any]) -> Card:
    """Return the page card of a refused row, whose thumbnail has been made already."""
    payload = _BASE64.sub(r"\1...", row["payload"])
    return Card(row["source_row"], row["thumbnail"], [CardText(payload)], f"{row['reason']}: {row['detail']}")


def _belongs_to(row: dict[str, Any], count: QuarantineCount) -> bool:
    return (row["source"], row["reason"]) == (count.source, count.reason)

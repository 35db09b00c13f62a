"""The ledger: which items of a source were taken in whole, so that they need no reading again (table `ingested`).

It saves time and decides nothing else: rows are known by their content, so an item that is read twice adds nothing.
That is why it may be written last, after both other tables, and only ever appended to: whatever is killed or runs
twice, the worst is that something is read again.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import NamedTuple

import pyarrow as pa
from delta.tables import DeltaTable
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from pipelines.config import DataConfig, short_hash
from pipelines.driver.ingest.commit import rows_of_source
from pipelines.formats.tables import INGESTED
from pipelines.platform import Platform

ITEMS = pa.schema([("item", pa.string()), ("state", pa.string())])


class Entry(NamedTuple):
    """What the items of one ingest share: name of the data config, hash of the rules, and the ingest."""

    source: str
    rules: str
    ingest_id: str


def rules_of(config: DataConfig) -> str:
    """A hash of what decides over a row. Where the input lies is no part of it, nor is how many bad rows are borne."""
    source = config.source.model_dump(exclude={"path", "table", "version"})
    limits = config.limits.model_dump(exclude={"max_bad_share"})
    return short_hash(source, limits, config.split.model_dump(), config.near_duplicates)


def items_of(rows: list[tuple[str, str]]) -> pa.Table:
    """Items and their states as ITEMS."""
    return pa.table([list(column) for column in zip(*rows, strict=True)] or [[], []], schema=ITEMS)


def taken_in(spark: SparkSession, platform: Platform, source: str, rules: str) -> pa.Table:
    """ITEMS of a source that were taken in by these rules."""
    rows = rows_of_source(spark, platform, INGESTED.name, source).filter(F.col("rules") == rules)
    return rows.select(*ITEMS.names).toArrow()


def fresh_of(items: pa.Table, taken: pa.Table) -> pa.Table:
    """Those ITEMS that were not taken in as they are now, each once."""
    left = items.join(taken.cast(ITEMS), ITEMS.names, join_type="left anti")
    return left.group_by(ITEMS.names).aggregate([])


def take_note(spark: SparkSession, platform: Platform, items: pa.Table, entry: Entry) -> None:
    """Write ITEMS down as taken in, in one commit that meets no other."""
    columns = entry._asdict() | {"ingested_at": datetime.now(UTC)}
    noted = spark.createDataFrame(items).withColumns({name: F.lit(value) for name, value in columns.items()})
    noted.select(*INGESTED.names).writeTo(platform.table(INGESTED.name)).append()


def forget(spark: SparkSession, platform: Platform, source: str) -> None:
    """Strike out a source's items: whatever happens next, the next ingest reads them."""
    DeltaTable.forName(spark, platform.table(INGESTED.name)).delete(F.col("source") == source)

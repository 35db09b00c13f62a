"""Ledger (table `ingested`): the items of a source that have been ingested completely and need not be read again.

The ledger only saves time and is not needed for correct results. Rows are identified by their content, so an item that
is read twice adds nothing. If `samples`, `texts` or `quarantine` was restored or replaced since an item was ingested,
the item is deleted from the ledger and read again. The ledger may therefore be written last, after the other tables. An
ingest adds its items to the ledger by a plain append. If an ingest is killed or runs twice, the worst consequence is
that items are read again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.config import DataConfig, short_hash
from pipelines.driver.delta.commits import TableHistory, read_history, read_history_of_files
from pipelines.driver.delta.on_disk import open_on_disk
from pipelines.driver.delta.row_times import later_than, newest_time
from pipelines.driver.ingest.table_rows import rows_of_source
from pipelines.formats.delta_files import NARROW_BATCH_ROWS, query, query_rows, quoted_text, to_rows
from pipelines.formats.table_schema import Table
from pipelines.formats.tables import INGESTED, QUARANTINE
from pipelines.platform import Platform

logger = logging.getLogger(__name__)

ITEMS = pa.schema([("item", pa.string()), ("state", pa.string())])
"""Schema of an item (a file, a row of a captions file, or a table) and its state (a change token or a version)."""
COLUMNS = (*ITEMS.names, "rules", "ingested_at")
"""Columns of the ledger that decide which items need not be read again."""
VERSION = "version "
"""Prefix of the state of a source table. The prefix is followed by the version number of the table and the id of the
commit that made this version. Lakesight 0.1.0 stored no id.
"""
FILLED = ("filled_version", "filled_commit")
"""Columns of the ledger that identify the table version of `samples` or `texts` in which the rows of an item are."""
REFUSED = ("refused_version", "refused_commit")
"""Columns of the ledger that identify the table version of `quarantine` in which the refused rows of an item are."""


class LedgerEntry(NamedTuple):
    """Values that all items of one ingest share.

    Attributes:
        source: name of the source, which is the name of its data config.
        rules: hash of the settings, from `hash_rules`.
        ingest_id: id of the ingest.
        filled_version: version of `samples` or `texts` that contains the rows of the items.
        filled_commit: id of the commit that made this version.
        refused_version: version of `quarantine` that contains the refused rows of the items, or None if no row of the
            ingest was refused.
        refused_commit: id of the commit that made this version.
    """

    source: str
    rules: str
    ingest_id: str
    filled_version: int
    filled_commit: str | None
    refused_version: int | None = None
    refused_commit: str | None = None


def hash_rules(config: DataConfig) -> str:
    """Return a hash of the settings that decide how a raw row is converted to a sample.

    The location and the version of the input, and the tolerated share of bad rows, are not part of the hash.
    """
    source = config.source.hashed_settings(exclude={"path", "table", "version"})
    limits = config.limits.hashed_settings(exclude={"max_bad_share"})
    return short_hash(source, limits, config.split.hashed_settings(), config.near_duplicates)


def items_table(rows: list[tuple[str, str]]) -> pa.Table:
    """Convert pairs of item and state to an Arrow table with the schema ITEMS.

    The columns are built by a builder, because `pyarrow.array` imports pandas, which takes longer than the rest of an
    ingest that finds nothing new.
    """
    columns = []
    for column in zip(*rows, strict=True) if rows else ((), ()):
        builder = pa.lib.StringBuilder()
        builder.append_values(column)
        columns.append(builder.finish())
    return pa.Table.from_arrays(columns, schema=ITEMS)


def read_ledger(spark: SparkSession, platform: Platform, source: str, rules: str) -> pa.Table:
    """Read the ITEMS of a source that have been ingested with the settings whose hash is `rules`.

    If an item is a table, only the last ingest of the table counts, because `samples` holds the rows of this ingest.
    The last ingest counts even if an earlier ingest read a newer version of the table, or if the two ingests had
    different settings.
    """
    if (opened := open_on_disk(platform, INGESTED)) is not None:
        return read_ledger_of_files(opened, source, rules)
    rows = rows_of_source(spark, platform, INGESTED.name, source)
    rows = rows.filter((F.col("rules") == rules) | F.col("state").startswith(VERSION))
    return select_last_versions(rows.select(*COLUMNS).toArrow(), rules)


def read_ledger_of_files(table: DeltaTable, source: str, rules: str) -> pa.Table:
    """Read the same ITEMS as `read_ledger`, but without Spark, from a table in a local folder."""
    used = f"(rules = {quoted_text(rules)} OR starts_with(state, {quoted_text(VERSION)}))"
    sql = f"SELECT {', '.join(COLUMNS)} FROM ledger WHERE source = {quoted_text(source)} AND {used}"  # noqa: S608 quoted
    return select_last_versions(query({"ledger": table}, sql, NARROW_BATCH_ROWS).read_all(), rules)


@dataclass(frozen=True)
class Ledger:
    """The ITEMS of a source that have been ingested with the settings whose hash is `rules`.

    A large source compares its items with the ledger in Spark, so the items are read only on demand.
    """

    spark: SparkSession
    platform: Platform
    source: str
    rules: str

    def read(self) -> pa.Table:
        """Read the items on the driver."""
        return read_ledger(self.spark, self.platform, self.source, self.rules)

    def rows(self) -> DataFrame:
        """Return the items as a DataFrame. The items must not be tables, because the order of ingests is ignored."""
        rows = rows_of_source(self.spark, self.platform, INGESTED.name, self.source)
        return rows.filter(F.col("rules") == self.rules).select(*ITEMS.names)


def has_other_rules(spark: SparkSession, platform: Platform, source: str, rules: str) -> bool:
    """Return whether items of a source were ingested with other settings, whose hash differs from `rules`."""
    if (opened := open_on_disk(platform, INGESTED)) is not None:
        other = f"source = {quoted_text(source)} AND rules <> {quoted_text(rules)}"
        return bool(query_rows(opened, "rules", other, "LIMIT 1"))
    rows = rows_of_source(spark, platform, INGESTED.name, source)
    return not rows.filter(F.col("rules") != rules).isEmpty()


def select_last_versions(entries: pa.Table, rules: str) -> pa.Table:
    """Return the ITEMS that were ingested with the settings `rules`.

    If an item is a source table, only the table's last entry in the ledger counts.

    Args:
        entries: rows of the ledger that belong to one source. Rows of source tables may have any hash of settings. All
            other rows must have the hash `rules`.
        rules: hash of the settings, from `hash_rules`.
    """
    is_version = pc.starts_with(entries["state"], VERSION)
    versions = sorted(to_rows(entries.filter(is_version)), key=itemgetter("ingested_at"))
    last = {entry["item"]: entry for entry in versions}.values()
    files = entries.filter(pc.invert(is_version)).select(ITEMS.names).cast(ITEMS)
    tables = items_table([(entry["item"], entry["state"]) for entry in last if entry["rules"] == rules])
    return pa.concat_tables([files, tables])


def pending_items(items: pa.Table, ingested: pa.Table) -> pa.Table:
    """Return the distinct ITEMS that have not been ingested in their current state."""
    pending = items.join(ingested.cast(ITEMS), ITEMS.names, join_type="left anti")
    return pending.group_by(ITEMS.names).aggregate([])


def pending_pairs(items: Iterable[tuple[str, str]], ingested: pa.Table) -> list[tuple[str, str]]:
    """Like `pending_items`, return the distinct pairs of item and state that have not been ingested.

    This function takes Python objects. For the join in `pending_items`, pyarrow imports pandas, but this function needs
    no pandas.
    """
    pending = dict.fromkeys(items)
    for batch in ingested.to_batches():
        for pair in zip(batch["item"].to_pylist(), batch["state"].to_pylist(), strict=True):
            pending.pop(pair, None)
    return list(pending)


def append_to_ledger(spark: SparkSession, platform: Platform, items: pa.Table, entry: LedgerEntry) -> None:
    """Append ITEMS to the ledger in one commit. An append does not conflict with the appends of other ingests."""
    versions = rows_of_source(spark, platform, INGESTED.name, entry.source).filter(F.col("state").startswith(VERSION))
    has_versions = isinstance(items, pa.Table) and pc.any(pc.starts_with(items["state"], VERSION)).as_py()
    newest = newest_time(versions, "ingested_at") if has_versions else None
    columns = entry._asdict() | {"ingested_at": later_than(newest)}
    frame = spark.createDataFrame(items) if isinstance(items, pa.Table) else items
    rows = frame.withColumns({name: F.lit(value) for name, value in columns.items()})
    rows.select(*INGESTED.names).writeTo(platform.table(INGESTED.name)).append()


def lost_commits(
    entries: Sequence[Mapping[str, Any]],
    columns: tuple[str, str],
    history: Callable[[Collection[int]], TableHistory],
) -> list[str]:
    """Return the ids of those commits in the ledger whose rows a table no longer has.

    A table loses the rows of a commit if the table is restored, replaced by a copy, or dropped. The items of these
    commits must be read again.

    Args:
        entries: distinct values of the given columns in the ledger rows of one source.
        columns: FILLED, or REFUSED for table `quarantine`.
        history: function that reads the history of the table, with the ids of the given versions.
    """
    version, commit = columns
    known = {(entry[version], entry[commit]) for entry in entries if entry[commit] is not None}
    if not known:
        return []
    found = history([number for number, _ in known])
    return [each for number, each in sorted(known) if not found.has(number, each)]


def has_lost_items(ledger: DeltaTable, filled: DeltaTable, quarantine: DeltaTable, source: str) -> bool:
    """Without Spark, return whether `filled` or `quarantine` has lost rows of items that are in the ledger."""
    entries = _entered_commits(ledger, source)
    return any(
        lost_commits(entries, columns, partial(read_history_of_files, table))
        for columns, table in ((FILLED, filled), (REFUSED, quarantine))
    )


def _entered_commits(ledger: DeltaTable, source: str) -> list[dict[str, Any]]:
    """Without Spark, return the distinct values of FILLED and REFUSED in the ledger rows of one source."""
    return query_rows(ledger, f"DISTINCT {', '.join((*FILLED, *REFUSED))}", f"source = {quoted_text(source)}")


def forget_lost_items(spark: SparkSession, platform: Platform, source: str, filled: Table) -> None:
    """In the ledger, delete the items whose rows `filled` or `quarantine` has lost. These items are read again."""
    if (opened := open_on_disk(platform, INGESTED)) is not None:
        entries = _entered_commits(opened, source)
    else:
        rows = rows_of_source(spark, platform, INGESTED.name, source)
        entries = rows.select(*FILLED, *REFUSED).distinct().toArrow().to_pylist()
    for pair, table in ((FILLED, filled), (REFUSED, QUARANTINE)):
        if lost := lost_commits(entries, pair, partial(read_history, spark, platform, table)):
            logger.warning("table %s was restored or replaced after an ingest of %s", table.name, source)
            _forget(spark, platform.table(INGESTED.name), source, pair[1], lost)


def _forget(spark: SparkSession, ledger: str, source: str, column: str, lost: Sequence[str]) -> None:
    """From the ledger, delete the items of a source that have one of the commit ids `lost` in `column`."""
    count = spark.table(ledger).filter((F.col("source") == source) & F.col(column).isin(*lost)).count()
    logger.warning("%d files or rows of captions of %s are read again", count, source)
    ids = ", ".join(f"'{each}'" for each in lost)
    delete = f"DELETE FROM {ledger} WHERE source = {{source}} AND {column} IN ({ids})"  # noqa: S608 (ids are hashes)
    spark.sql(delete, source=source)


def delete_from_ledger(spark: SparkSession, platform: Platform, source: str) -> None:
    """Delete the ledger rows of a source, so that the next ingest reads all items of the source.

    A refresh calls this function before the refresh writes anything, but only if rows will certainly be replaced. If
    the refresh is killed between two writes, the next ingest adds the missing rows.
    """
    spark.sql(f"DELETE FROM {platform.table(INGESTED.name)} WHERE source = {{source}}", source=source)  # noqa: S608

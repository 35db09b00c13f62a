"""Queries, without Spark, on Delta tables in local folders. Spark would need up to several seconds per query."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from deltalake import DeltaTable

from pipelines.formats.delta_files import is_supported, open_delta, query_rows, quoted_name, quoted_value
from pipelines.formats.table_schema import Table
from pipelines.platform import Platform


def open_on_disk(platform: Platform, table: Table) -> DeltaTable | None:
    """Open the newest version of a table, or return None if only Spark can open the tables, as in a workspace."""
    return open_delta(platform.tables / table.name) if is_supported(platform.tables) else None


def count_on_disk(table: DeltaTable, equal: Mapping[str, str | datetime], by: str) -> dict[str, int]:
    """Count the rows whose columns have the values in `equal`. Return a dict from each value of column `by` to the
    number of rows with this value, sorted by value.

    Rows are counted in batches. A data file is not read if its statistics show that it lacks the values.

    Args:
        table: Delta table whose rows are counted.
        equal: non-empty dict from the name of a column to the value that the column must have.
        by: name of the column by which the counts are grouped, such as 'source'.
    """
    column = quoted_name(by)
    found = query_rows(table, f"{column} AS value, COUNT(*) AS num_rows", equal_to(equal), f"GROUP BY {column}")
    return dict(sorted((row["value"], row["num_rows"]) for row in found))


def has_rows(table: DeltaTable, equal: Mapping[str, str | datetime]) -> bool:
    """Return whether the table has a row whose columns have the values in `equal`."""
    return bool(query_rows(table, "1 AS one", equal_to(equal), "LIMIT 1"))


def equal_to(equal: Mapping[str, str | datetime]) -> str:
    """Return an SQL condition that is true if columns have the values in `equal`. `equal` must not be empty."""
    return " AND ".join(f"{quoted_name(name)} = {quoted_value(value)}" for name, value in equal.items())

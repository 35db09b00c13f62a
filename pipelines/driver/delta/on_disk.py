"""Queries on Delta tables in local folders without Spark. Spark would need up to several seconds per query."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from functools import reduce
from operator import and_

import pyarrow.dataset as ds
from deltalake import DeltaTable

from pipelines.formats.delta_files import arrow_dataset, is_supported, open_delta
from pipelines.formats.table_schema import Table
from pipelines.platform import Platform


def open_on_disk(platform: Platform, table: Table) -> DeltaTable | None:
    """Open the newest version of a table, or return None if only Spark can open the tables, as in a workspace."""
    return open_delta(platform.tables / table.name) if is_supported(platform.tables) else None


def count_on_disk(table: DeltaTable, equal: Mapping[str, str | datetime], by: str) -> dict[str, int]:
    """Count the rows whose columns have the values `equal`. Return a dict from each value of column `by`, sorted, to
    the number of rows with this value.

    Rows are counted in batches, and files whose statistics exclude the values are not read.

    Args:
        table: Delta table whose rows are counted.
        equal: required values: a non-empty dict from the name of a column to the value.
        by: name of the column by which the counts are grouped, such as 'source'.
    """
    counts: Counter[str] = Counter()
    for batch in arrow_dataset(table).to_batches(columns=[by], filter=_condition(equal)):
        for group in batch.column(by).value_counts():
            counts[group["values"].as_py()] += group["counts"].as_py()
    return dict(sorted(counts.items()))


def has_rows(table: DeltaTable, equal: Mapping[str, str | datetime]) -> bool:
    """Return whether the table has a row whose columns have the values `equal`."""
    return bool(arrow_dataset(table).head(1, columns=list(equal), filter=_condition(equal)).num_rows)


def _condition(equal: Mapping[str, str | datetime]) -> ds.Expression:
    return reduce(and_, (ds.field(name) == value for name, value in equal.items()))

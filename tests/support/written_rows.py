"""Helper that writes rows of Lakesight's tables as Delta files, without Spark."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import write_deltalake

from pipelines.formats.table_schema import Table

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def write_rows(folder: Path, table: Table, *rows: Mapping[str, object]) -> None:
    """Append rows to a table in a folder. Nullable columns without a value are null. Other columns without a value are
    0, an empty list, NOW or the text `h`."""
    row: dict[str, Any] = {field.name: None if field.nullable else _filler(field.type) for field in table.arrow_schema}
    found = pa.Table.from_pylist([row | dict(values) for values in rows], table.arrow_schema)
    write_deltalake(folder / table.name, found, mode="append")


def _filler(kind: pa.DataType) -> object:
    if pa.types.is_timestamp(kind):
        return NOW
    return [] if pa.types.is_list(kind) else 0 if pa.types.is_primitive(kind) else "h"

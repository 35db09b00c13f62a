"""Parsers of rows that Spark has read from tables: Parquet files, Delta tables, and the `quarantine` table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipelines.executor.ingest.records.record import Problem, Record, parse_json_object

FILE = "_lakesight_file"
"""Name of the column that holds the file name of a row."""


def table_records(batches: Iterator[pa.RecordBatch], image: str) -> Iterator[Record]:
    """Convert table rows to records. An image struct of bytes and path becomes two fields: IMAGE and IMAGE.path.

    Args:
        batches: batches in which the first column is the file name and the next columns are those of the table.
        image: name of the image column (IMAGE).
    """
    for batch in batches:
        names = batch.schema.names[1:]
        for file, *values in zip(*(_to_python(column) for column in batch.columns), strict=True):
            fields = dict(zip(names, values, strict=True))
            picture = fields.get(image)
            if isinstance(picture, dict) and "bytes" in picture:
                fields |= {image: picture["bytes"], f"{image}.path": picture.get("path")}
            yield Record(file, fields)


def _to_python(column: pa.Array) -> list[Any]:
    """Convert a column to Python values. Invalid UTF-8, which Spark accepts in a string, becomes U+FFFD."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        if not pa.types.is_string(column.type):
            raise
        values = [v if v is None else v.decode(errors="replace") for v in column.cast(pa.binary()).to_pylist()]
    return values


def payload_records(batches: Iterator[pa.RecordBatch]) -> Iterator[Record]:
    """Restore the original records of `quarantine` rows. A row that ingest could not parse is refused again.

    Args:
        batches: batches with the columns `source_row` and `payload`.
    """
    for batch in batches:
        for name, payload in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True):
            file, fields = name.rpartition("#")[0], parse_json_object(payload)
            if isinstance(fields, Problem):
                detail = "the row could not be parsed: correct it in its file and ingest the file again"
                yield Record(file, {}, payload, Problem("malformed_record", detail), name)
            else:
                yield Record(file, fields, source_row=name)

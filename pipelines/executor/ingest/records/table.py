"""Parsers of rows that Spark has read from a source's Delta table or from the table `quarantine`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from pipelines.executor.ingest.outcome import Refused
from pipelines.executor.ingest.records.arrow_values import to_python
from pipelines.executor.ingest.records.record import Fields, Problem, Record, parse_json_object
from pipelines.executor.ingest.values import normalize_id


def delta_records(batches: Iterator[pa.RecordBatch], names: Sequence[str], image: str) -> Iterator[Record]:
    """Convert rows of a Delta table to records.

    The unused columns of a row are converted only if the row is refused or may be refused later.

    An image struct of bytes and path becomes two fields: the image column and `COLUMN.path`.

    Args:
        batches: batches with the columns of `sources.table.open.select_columns` (the file, the used columns and a
            struct of the unused columns).
        names: names of the columns that the data config uses.
        image: name of the image column.
    """
    for batch in batches:
        file, *used, others = batch.columns
        for n, (name, *values) in enumerate(zip(*(to_python(column) for column in (file, *used)), strict=True)):
            fields = dict(zip(names, values, strict=True))
            picture = fields.get(image)
            if isinstance(picture, dict) and "bytes" in picture:
                fields |= {image: picture["bytes"], f"{image}.path": picture.get("path")}
            yield Record(name, fields, others=partial(_read_others, others.slice(n, 1)))


def _read_others(row: pa.Array) -> Fields:
    """Convert the struct of the unused columns to a dict.

    The struct is null if the table has no unused columns.
    """
    fields: Fields = to_python(row)[0] or {}
    return fields


def add_image_ids(batches: Iterator[pa.RecordBatch], source: str) -> Iterator[pa.RecordBatch]:
    """Add the column `image_id` to batches with a column of ids. Leave out rows whose value is not a valid id.

    Args:
        batches: Arrow batches whose first column, `key`, contains the ids.
        source: name of the data config, which is the prefix of image ids.
    """
    for batch in batches:
        ids = pa.array([_image_id(value, source) for value in to_python(batch.column(0))], pa.string())
        yield batch.append_column("image_id", ids).filter(ids.is_valid())


def _image_id(value: Any, source: str) -> str | None:
    try:
        given = normalize_id(value)
    except Refused:  # the row is refused when it is decoded, so no picture has this id
        return None
    return given and f"{source}/{given}"


def payload_records(batches: Iterator[pa.RecordBatch]) -> Iterator[Record]:
    """Convert rows of `quarantine` back to the records that were refused.

    A row that ingest could not parse is refused again.

    Args:
        batches: Arrow batches with the columns `source_row` and `payload` of `quarantine`.
    """
    for batch in batches:
        for name, payload in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True):
            file, fields = name.rpartition("#")[0], parse_json_object(payload)
            if isinstance(fields, Problem):
                detail = "the row could not be parsed: correct it in its file and ingest the file again"
                yield Record(file, {}, payload, Problem("malformed_record", detail), name)
            else:
                yield Record(file, fields, source_row=name)

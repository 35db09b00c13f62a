"""Parser of Parquet files. Executors read the columns that the data config uses, in batches of bounded size.

Unused columns may have any types, names and values. The unused columns of a row are read only if the row is refused or
may be refused later, because the table `quarantine` stores the whole row.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple

import pyarrow as pa

from pipelines.executor.ingest.records.arrow_values import (
    NotRepresentable,
    NotStored,
    picture_values,
    size_of,
    too_large,
    whole_values,
)
from pipelines.executor.ingest.records.parquet_file import ParquetColumns
from pipelines.executor.ingest.records.record import Fields, Problem, Record, add_partition, unreadable_file
from pipelines.executor.ingest.storage import FILE_ERRORS, require_damage

MAX_VALUE_BYTES = 16 * 2**20
"""Largest size of a value that is not a picture, in bytes."""
MAX_PICTURE_BYTES = 32 * 2**20
"""A picture of at most this number of bytes is stored in `quarantine` even if it exceeds data.limits.max_bytes."""
MAX_OTHERS_BYTES = 32 * 2**20
"""Largest total size of the unused columns of a refused row, in bytes. Values beyond this size are not stored."""


class _Range(NamedTuple):
    """A byte range of a Parquet file. A row group belongs to the range in which the group's picture column begins."""

    path: str
    file: str
    start: int
    end: int
    partition: Mapping[str, str | None]


class _Columns(NamedTuple):
    """Columns that are used: the picture column and all named columns. `max_bytes` is the largest size of a picture."""

    image: str
    named: Sequence[str]
    max_bytes: int


def parquet_records(
    batches: Iterator[pa.RecordBatch], image: str, named: Sequence[str], max_bytes: int
) -> Iterator[Record]:
    """Read the rows of byte ranges of Parquet files. All damage in a range becomes one record `unreadable_file`.

    The column `partition` of a batch is a map of the values in folder names such as `year=2024`. All rows of a file
    have the same partition values. Hugging Face's struct of bytes and path becomes two fields: the picture column
    IMAGE, and IMAGE.path.

    Args:
        batches: batches with the columns path, file, start, end and partition.
        image: name of the picture column.
        named: names of all columns that are used.
        max_bytes: largest size of a picture, in bytes.
    """
    columns = _Columns(image, named, max(max_bytes, MAX_PICTURE_BYTES))
    for batch in batches:
        for row in batch.to_pylist():
            yield from _read_range(_Range(**row | {"partition": dict(row["partition"])}), columns)


def _read_range(part: _Range, columns: _Columns) -> Iterator[Record]:
    opened = _open(part, columns)
    if isinstance(opened, str):
        if part.start == 0:  # damage of the whole file is reported and counted once
            yield unreadable_file(part.file, part.path, opened)
        return
    damage = []
    with opened:
        for group in opened.groups(opened.names.index(columns.image), part.start, part.end):
            read = 0
            try:
                for record in _read_group(opened, group, part, columns):
                    yield record
                    read += 1
            except FILE_ERRORS as error:
                lost = f"{opened.rows(group) - read} of {opened.rows(group)} rows of row group {group} are lost"
                damage.append(f"{lost}: {_describe_or_raise(error)}")
    if damage:
        yield unreadable_file(part.file, part.path, "; ".join(damage)[:2000])


def _open(part: _Range, columns: _Columns) -> ParquetColumns | str:
    """Open a Parquet file, or return a text that says why the file cannot be read.

    Raises:
        OSError: the machine has a fault, or the file is missing although the first range may have been read. In this
            case, the file was deleted in the meantime, or only this machine does not find it.
    """
    try:
        opened = ParquetColumns(part.path)
    except FILE_ERRORS as error:
        damage = _describe_or_raise(error)
        if part.start and isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a cut file
            raise
        return f"not a readable Parquet file: {damage}"
    wanted = [columns.image, *(name for name in columns.named if name not in part.partition or name in opened.names)]
    counts = {name: opened.names.count(name) for name in wanted}
    wrong = [
        f"{count} columns {name}" if count else f"no column {name}" for name, count in counts.items() if count != 1
    ]
    if not wrong:
        return opened
    opened.close()
    return f"the file has {' and '.join(wrong)}; its columns are {', '.join(n[:80] for n in opened.names[:20])}"


def _describe_or_raise(error: Exception) -> str:
    """Describe the damage of a file.

    If the error counts as a machine failure, raise it, so that Spark retries the task.
    """
    if isinstance(error, MemoryError):
        raise error
    return " ".join(require_damage(error).split())


def _read_group(opened: ParquetColumns, group: int, part: _Range, columns: _Columns) -> Iterator[Record]:
    """Yield the rows of a row group.

    Raises:
        pa.ArrowException, OSError: the row group is damaged, or its pages are too large.
    """
    image, most = columns.image, columns.max_bytes
    in_file = [name for name in dict.fromkeys(columns.named) if name in opened.names and name != image]
    folder = {name: value for name, value in part.partition.items() if name in (image, *columns.named)}
    others = _OtherColumns(part, group, [image, *columns.named])
    pictures = opened.arrays(group, opened.names.index(image), ("bytes", "path"))
    streams: list[Iterator[Fields]] = [chain.from_iterable(picture_values(image, a, most) for a in pictures)]
    streams += [_values(opened, group, name) for name in in_file]
    read = 0
    for read, fields in enumerate(zip(*streams, strict=False), start=1):
        row = add_partition({name: value for field in fields for name, value in field.items()}, folder)
        yield Record(part.file, row, problem=_find_problem(row, image), others=partial(others.row, read - 1))
    if read < opened.rows(group):
        raise pa.ArrowInvalid(f"a column ends after {read} rows")


def _values(opened: ParquetColumns, group: int, name: str) -> Iterator[Fields]:
    for array in opened.arrays(group, opened.names.index(name)):
        for value in whole_values(array, MAX_VALUE_BYTES):
            yield {name: value}


def _find_problem(fields: Fields, image: str) -> Problem | None:
    """If a value of a row is too large or cannot be represented in Python, return the problem, else None."""
    for name, value in fields.items():
        if isinstance(value, NotRepresentable):
            return Problem("malformed_record", f"column {name}: {value.what}")
        if isinstance(value, NotStored):
            return Problem("too_large" if name == image else "text_too_long", f"column {name}: {value.what}")
    return None


class _OtherColumns:
    """Unused columns of a row group, which are opened at the first call of `row`."""

    def __init__(self, part: _Range, group: int, used: Sequence[str]) -> None:
        self.part, self.group, self.used = part, group, used
        self.cursors: list[tuple[str, _Cursor]] | None = None
        self.next_row = 0

    def row(self, row: int) -> Fields:
        """Return the unused columns and partition values of a row. Calls are fastest with ascending row numbers."""
        folder = {name: value for name, value in self.part.partition.items() if name not in self.used}
        if row < self.next_row or self.cursors is None:
            try:
                self.cursors = self._open()
            except FILE_ERRORS as error:
                return folder | {"other columns": NotStored(_describe_or_raise(error))}
        self.next_row = row + 1
        fields: Fields = {}
        left = MAX_OTHERS_BYTES
        for name, cursor in self.cursors:
            value = cursor.value(row)
            if isinstance(value, pa.Array):
                size = size_of(value)
                value = next(whole_values(value, left)) if size <= left else too_large(value, left)
                left -= min(size, left)
            fields[name if name not in fields else f"{name} (another)"] = value
        return add_partition(fields, folder)

    def _open(self) -> list[tuple[str, _Cursor]]:
        """Open the unused columns. The file is closed when no column refers to the file any more."""
        opened = ParquetColumns(self.part.path, buffer_bytes=2**16)
        positions = [(position, name) for position, name in enumerate(opened.names) if name not in self.used]
        return [(name, _Cursor(opened.arrays(self.group, position))) for position, name in positions]


class _Cursor:
    """Reader of single values of a column, which keeps its position in the batches of the column."""

    def __init__(self, arrays: Iterator[pa.Array]) -> None:
        self.arrays = arrays
        self.array = pa.nulls(0)
        self.start = 0
        self.failure = ""

    def value(self, row: int) -> pa.Array | NotStored:
        """Return the value of a row as an array of one value, or a NotStored that says why reading has failed."""
        while not self.failure and row >= self.start + len(self.array):
            try:
                following = next(self.arrays)
            except StopIteration:
                self.failure = "the column ends before this row"
            except FILE_ERRORS as error:
                self.failure = _describe_or_raise(error)
            else:
                self.start, self.array = self.start + len(self.array), following
        return NotStored(self.failure) if self.failure else self.array.slice(row - self.start, 1)

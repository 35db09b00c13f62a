"""Functions with which Python workers read the lines of files, in byte ranges and with bounded memory.

A line may contain megabytes of base64. Spark's text reader is not used for two reasons. Spark would copy each line
about six times inside the JVM, which takes half as long as decoding the picture in the line. In addition, one damaged
file would fail the whole Spark job.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import IO, Any, NamedTuple

import pyarrow as pa

from pipelines.config import LimitsConfig
from pipelines.executor.ingest.records.record import Fields, Problem, Record, unreadable_file
from pipelines.executor.ingest.storage import FILE_ERRORS, open_binary, printable, require_damage
from pipelines.executor.ingest.text_stream import open_text

WHOLE = -1
"""If a file cannot be read in parts, its range is the whole file, and the column `end` of RANGE has this value."""
RANGE = pa.schema(
    [
        ("path", pa.binary()),  # path or URL, encoded by os.fsencode, because some file names are not UTF-8
        ("file", pa.string()),
        ("start", pa.int64()),
        ("end", pa.int64()),  # byte offset at which the next range begins, or WHOLE
        ("layout", pa.int32()),  # index into the list of layouts
        ("partition", pa.string()),  # JSON object of partition columns
    ]
)
"""Schema of byte ranges of text files. A line belongs to the range in which the line begins."""
BOM = "\ufeff"
LINE_ENDS = "\r\n"
"""Characters that are stripped from the end of a line. Some spreadsheets end a line with two carriage returns."""
CHUNK_BYTES = 2**20
KEPT_BYTES = 64 * 2**10
"""If a line is too long, the table `quarantine` stores this number of bytes from the beginning of the line."""


class Layout(NamedTuple):
    """Layout of a text file, which the driver determines from the beginning of the file.

    Attributes:
        separator: byte that separates lines: a carriage return in files of old spreadsheets, a line feed in all others.
        skip: number of rows at the start of the file that contain no values, such as the header and blank lines.
        names: column names of a CSV file.
        delimiter: character between the fields of a CSV file.
        escape: character that precedes a quote inside a quoted CSV field; empty if two quotes stand for one quote.
        quote: character before and after a CSV field that may contain delimiters; empty if no field is quoted.
        whole: whether the file is read as one range, because it is compressed, is not in UTF-8, or has rows that may
            contain line ends.
        problem: reason for which no row of the file can be read, or None.
    """

    separator: bytes = b"\n"
    skip: int = 0
    names: tuple[str, ...] = ()
    delimiter: str = ","
    escape: str = ""
    quote: str = '"'
    whole: bool = False
    problem: str | None = None


class Range(NamedTuple):
    """A byte range of a text file (a row of RANGE), with the file's layout and the values of its partition columns."""

    path: str
    file: str
    start: int
    end: int
    layout: Layout
    partition: Fields


class LongLine(NamedTuple):
    """A line that is longer than the limit: its first bytes, its size in bytes and its SHA-256."""

    head: bytes
    size: int
    sha256: str


ReadRange = Callable[[Range], Iterator[Record]]


def range_records(batches: Iterator[pa.RecordBatch], layouts: Sequence[Layout], read: ReadRange) -> Iterator[Record]:
    """Read the records of byte ranges. After the last intact row of a damaged range, one record describes the damage.

    Args:
        batches: Arrow batches of the schema RANGE.
        layouts: layouts of the files.
        read: function that parses one range into records.
    """
    for batch in batches:
        for row in batch.to_pylist():
            partition = json.loads(row["partition"])
            path, layout = os.fsdecode(row["path"]), layouts[row["layout"]]
            yield from _read_range(Range(path, row["file"], row["start"], row["end"], layout, partition), read)


def _read_range(part: Range, read: ReadRange) -> Iterator[Record]:
    if part.layout.problem:
        yield unreadable_file(part.file, printable(part.path), part.layout.problem)
        return
    count = 0
    try:
        for record in read(part):
            yield record
            count += 1
    except FILE_ERRORS as error:
        damage = require_damage(error)
        after = f"after {count} rows" + (f" of the part from byte {part.start} on" if part.start else "")
        yield unreadable_file(part.file, printable(part.path), f"{after}: {damage}")


def line_limit(limits: LimitsConfig) -> int:
    """Return the largest size of a line in bytes, with room for the largest picture in base64 and for some text."""
    return limits.max_bytes * 3 // 2 + 2**20


def range_lines(part: Range, limit: int) -> Iterator[tuple[bytes, bytes] | LongLine]:
    """Yield the lines of a range, each with its line end, which is a line feed or a carriage return.

    A line of more than `limit` bytes becomes a LongLine.

    If a line ends with a carriage return and a line feed, the carriage return stays at the end of the line's content.
    """
    other = _other_end(part.layout.separator)
    for content in _range_contents(part, limit):
        at = 0
        while isinstance(content, bytes) and 0 <= (found := content.find(other, at)) < len(content) - 1:
            yield content[at:found], other
            at = found + 1
        yield content if isinstance(content, LongLine) else (content[at:] if at else content, part.layout.separator)


def line_text(content: bytes) -> str:
    """Decode a line, and remove its line end and the byte-order mark of its file. Invalid bytes become U+FFFD."""
    return content.decode("utf-8", errors="replace").removeprefix(BOM).rstrip(LINE_ENDS)


def _range_contents(part: Range, limit: int) -> Iterator[bytes | LongLine]:
    """Split a range at the layout's separator, and yield the lines."""
    separator = part.layout.separator
    if part.end == WHOLE:
        with closing(open_text(part.path)) as file:
            yield from split_stream(file, separator, limit)
        return
    with closing(open_binary(part.path)) as file:
        at = part.start
        if part.start:  # skip a line that began in the previous range
            file.seek(part.start - 1)
            at += _skip_line(file, separator) - 1
            file.seek(at)
        for content in split_stream(file, separator, limit) if at < part.end else ():
            yield content
            at += (content.size if isinstance(content, LongLine) else len(content)) + 1
            if at >= part.end:
                return


def _skip_line(file: IO[bytes], separator: bytes) -> int:
    """Return the number of bytes up to the next separator, including the separator.

    If there is no further separator, count one byte more than the rest of the file has.
    """
    size = 0
    while chunk := file.read(CHUNK_BYTES):
        found = chunk.find(separator)
        if found >= 0:
            return size + found + 1
        size += len(chunk)
    return size + 1


def split_stream(file: IO[bytes], separator: bytes, limit: int) -> Iterator[bytes | LongLine]:
    """Split a stream at a separator, while at most `limit` bytes and a few chunks are in memory.

    If a line is longer than the limit, only its first KEPT_BYTES bytes are kept in memory. The line end may change in
    the middle of a file. A line that is too long is therefore also split at the other line end (carriage return or line
    feed).
    """
    line = _PendingLine(_other_end(separator), limit)
    read1 = getattr(file, "read1", file.read)
    while chunk := read1(CHUNK_BYTES):
        first, *further = chunk.split(separator)
        yield from line.add(first)
        if further:
            yield line.end()
            yield from further[:-1]
            yield from line.add(further[-1])
    if line.size:
        yield line.end()


class _PendingLine:
    """A line whose end has not been read yet."""

    def __init__(self, other: bytes, limit: int) -> None:
        self.other, self.limit = other, limit
        self._reset()

    def _reset(self) -> None:
        self.size = 0
        self.parts: list[bytes] = []
        self.digest: Any = None

    def add(self, part: bytes) -> Iterator[bytes | LongLine]:
        """Append bytes to the line. If the line becomes too long, split it at the other kind of line end."""
        self.parts.append(part)
        self.size += len(part)
        if self.size <= self.limit:
            return
        if self.digest is None and any(self.other in one for one in self.parts):
            *complete, rest = b"".join(self.parts).rpartition(self.other)
            self._reset()
            yield complete[0]
            self.parts, self.size = [rest], len(rest)
        elif self.digest is None:
            joined = b"".join(self.parts)
            self.digest, self.parts = hashlib.sha256(joined), [joined[:KEPT_BYTES]]
        else:
            before, found, rest = self.parts.pop().partition(self.other)
            self.digest.update(before)
            self.size -= len(found) + len(rest)
            if found:
                yield self.end()
                self.parts, self.size = [rest], len(rest)

    def end(self) -> bytes | LongLine:
        """Return the complete line, and begin a new line."""
        parts, size, digest = self.parts, self.size, self.digest
        self._reset()
        return b"".join(parts) if digest is None else LongLine(parts[0], size, digest.hexdigest())


def _other_end(separator: bytes) -> bytes:
    return b"\r" if separator == b"\n" else b"\n"


def long_line_record(file: str, fields: Fields, line: LongLine, limit: int) -> Record:
    """Return the record of a line that is too long. The record contains the beginning of the line."""
    raw = f"{line.head.decode(errors='replace')} [... {line.size} bytes, SHA-256 {line.sha256}]"
    return Record(file, fields, raw, Problem("too_large", f"a line of {line.size} bytes; at most {limit} are allowed"))

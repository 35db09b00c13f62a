"""Parser of files of plain text: a record is a document, a paragraph or a line.

A file is read as a stream, so the memory that a file needs depends on its longest row and not on its size. Compression
and encoding are recognised from the content (`ingest.text_stream`).
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import closing
from typing import Literal

import pyarrow as pa

from pipelines.executor.ingest.records.record import Problem, Record, unreadable_file
from pipelines.executor.ingest.storage import FILE_ERRORS, printable, require_damage
from pipelines.executor.ingest.text_stream import open_text

TEXT = "text"
"""Name of the field of a record that contains the text."""
FILES = pa.schema([("path", pa.binary()), ("file", pa.string())])
"""Schema of the raw rows. Each raw row stands for one file.

A path is encoded by os.fsencode, because the name of a file can contain bytes that are not UTF-8.
"""
KEPT_CHARS = 64 * 2**10
"""If a row is too long, `quarantine` keeps this number of characters from the beginning of the row."""

Rows = Literal["document", "paragraph", "line"]


def text_records(batches: Iterator[pa.RecordBatch], rows: Rows, max_chars: int) -> Iterator[Record]:
    """Read the rows of files. If a file is damaged, the last record describes the damage.

    Args:
        batches: batches of the schema FILES.
        rows: unit of text that becomes a row (`document`, `paragraph` or `line`).
        max_chars: largest length of a row, in characters. A row with more than `max_chars` characters is refused, and
            only its beginning is kept in memory.
    """
    for batch in batches:
        for row in batch.to_pylist():
            yield from _read_file(os.fsdecode(row["path"]), row["file"], rows, max_chars)


def _read_file(path: str, file: str, rows: Rows, max_chars: int) -> Iterator[Record]:
    count = 0
    try:
        with closing(open_text(path)) as stream:
            for record in split_text(io.TextIOWrapper(stream, "utf-8", errors="replace"), file, rows, max_chars):
                yield record
                count += 1
    except FILE_ERRORS as error:
        yield unreadable_file(file, printable(path), f"after {count} rows: {require_damage(error)}")


def split_text(lines: io.TextIOBase, file: str, rows: Rows, max_chars: int) -> Iterator[Record]:
    """Divide a text into rows. In the rows, every line end of the text is a line feed.

    A long line is read in pieces. A line is blank if all its pieces are blank.
    """
    row = _PendingRow(file, max_chars)
    blank = True
    while piece := lines.readline(max_chars):
        blank = blank and not piece.strip()
        if not blank or (rows == "document" and row.begun):
            row.add(piece)
        if piece.endswith("\n"):
            if rows == "line" or (rows == "paragraph" and blank):
                yield from row.end()
            blank = True
    yield from row.end()


class _PendingRow:
    """A row that has not been read to its end. If the row becomes too long, only its beginning is kept in memory."""

    def __init__(self, file: str, max_chars: int) -> None:
        self._file, self._max_chars = file, max_chars
        self._pieces: list[str] = []
        self._chars = 0

    @property
    def begun(self) -> bool:
        """Whether a piece of the row has been read."""
        return bool(self._pieces)

    def add(self, piece: str) -> None:
        """Append a piece of text."""
        if self._chars <= self._max_chars:
            self._pieces.append(piece)
        self._chars += len(piece)

    def end(self) -> Iterator[Record]:
        """If at least one piece of the row has been read, yield the row. Then begin a new row."""
        text, chars = "".join(self._pieces), self._chars
        self._pieces, self._chars = [], 0
        if chars > self._max_chars:
            detail = f"{chars} characters, at most {self._max_chars}"
            yield Record(self._file, {TEXT: text[:KEPT_CHARS]}, problem=Problem("text_too_long", detail))
        elif text:
            yield Record(self._file, {TEXT: text})

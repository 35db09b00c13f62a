"""Lines of text files, by which base64 pictures come: as Spark read them, or read here from the file itself.

A line may hold megabytes. Through Spark's text reader it is copied half a dozen times inside the JVM, which takes half
as long as decoding its picture; so executors read plain files themselves, range by range, and Spark only what is
compressed or lies where no plain file can be opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

ENDS = b"\r\n"
"""What ends a line, in any number: spreadsheets end some in two carriage returns."""


class Line(NamedTuple):
    """One line of a file.

    Attributes:
        path: of the file.
        file: the last part of the path.
        start: the byte of the file at which the part of it begins that is read in one go.
        header: which of the source's headers the file has.
        content: UTF-8, without the line's end.
    """

    path: str
    file: str
    start: int
    header: int
    content: bytes


Lines = Callable[[Iterator[pa.RecordBatch]], Iterator[Line]]


def given_lines(batches: Iterator[pa.RecordBatch]) -> Iterator[Line]:
    """Lines that Spark has read.

    Args:
        batches: columns of Line.
    """
    for batch in batches:
        path, file, start, header = (batch.column(name).to_pylist() for name in Line._fields[:-1])
        for *about, content in zip(path, file, start, header, batch.column("content"), strict=True):
            yield Line._make([*about, content.as_py().rstrip(ENDS)])


def read_lines(batches: Iterator[pa.RecordBatch]) -> Iterator[Line]:
    """Lines of ranges of files: each line that begins in a range, to its end, one in memory at a time.

    Args:
        batches: columns of Line but the last, and `end`: the byte at which the next range begins.
    """
    for batch in batches:
        for row in batch.to_pylist():
            path, start = row["path"], row["start"]
            with Path(path).open("rb", buffering=1 << 20) as file:
                at = start
                if start:  # a line that began before belongs to the range before
                    file.seek(start - 1)
                    at += len(file.readline()) - 1
                while at < row["end"] and (content := file.readline()):
                    at += len(content)
                    yield Line(path, row["file"], start, row["header"], content.rstrip(ENDS))

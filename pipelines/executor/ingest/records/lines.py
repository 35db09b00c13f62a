"""Readers of text lines: `spark_lines` takes lines from Spark's text reader, and `file_lines` reads the file itself.

A line may hold megabytes of base64. Spark's text reader copies each line about six times inside the JVM, which takes
half as long as decoding the picture in the line. Python workers therefore read plain files themselves, one byte range
after the other. Spark reads only compressed files and files on storage that cannot be opened as plain files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

LINE_ENDS = b"\r\n"
"""Characters that are stripped from the end of a line. Some spreadsheets end a line with two carriage returns."""


class Line(NamedTuple):
    """One line of a file.

    Attributes:
        path: full path of the file.
        file: name of the file.
        start: byte offset of the range of the file that contains the line.
        header: index of the file's header in the source's list of headers.
        content: UTF-8 bytes of the line, without its line end.
    """

    path: str
    file: str
    start: int
    header: int
    content: bytes


Lines = Callable[[Iterator[pa.RecordBatch]], Iterator[Line]]


def spark_lines(batches: Iterator[pa.RecordBatch]) -> Iterator[Line]:
    """Yield lines that Spark's text reader has read.

    Args:
        batches: batches with the fields of Line as columns.
    """
    for batch in batches:
        path, file, start, header = (batch.column(name).to_pylist() for name in Line._fields[:-1])
        for *columns, content in zip(path, file, start, header, batch.column("content"), strict=True):
            yield Line._make([*columns, content.as_py().rstrip(LINE_ENDS)])


def file_lines(batches: Iterator[pa.RecordBatch]) -> Iterator[Line]:
    """Read the lines of byte ranges of files, with only one line in memory at a time.

    A line belongs to the range in which the line begins.

    Args:
        batches: batches with the fields of Line as columns, but with `end` (the byte offset at which the next range
            begins) instead of `content`.
    """
    for batch in batches:
        for row in batch.to_pylist():
            path, start = row["path"], row["start"]
            with Path(path).open("rb", buffering=1 << 20) as file:
                at = start
                if start:  # skip a line that began in the previous range
                    file.seek(start - 1)
                    at += len(file.readline()) - 1
                while at < row["end"] and (content := file.readline()):
                    at += len(content)
                    yield Line(path, row["file"], start, row["header"], content.rstrip(LINE_ENDS))

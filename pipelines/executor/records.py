"""Records as their files hold them: the half of a reader that executors run. Nothing about a record is judged here.

Spark's own CSV parser takes half as long as decoding the pictures in its fields, so executors take lines as bytes and
split them themselves; Spark parses only where quotes may hold line breaks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa

Fields = dict[str, str | None]


class Record(NamedTuple):
    """One record: its file's name; the line as it was, where it is no record of that file (else None); its columns."""

    file: str
    raw: str | None
    fields: Fields


Read = Callable[[Iterator[pa.RecordBatch]], Iterator[Record]]
"""Batches of a source's rows, in whatever columns its reader chose, to records."""


def parsed_records(batches: Iterator[pa.RecordBatch]) -> Iterator[Record]:
    """Records that Spark has parsed.

    Args:
        batches: columns `file`, `raw` and `row` (a map of the source's own columns to strings).
    """
    for batch in batches:
        for row in batch.to_pylist():
            yield Record(row["file"], row["raw"], dict(row["row"]))


def csv_records(batches: Iterator[pa.RecordBatch], headers: Sequence[tuple[str, ...]]) -> Iterator[Record]:
    """Records of CSV lines. Blank lines are none, nor is the first other line of a file: the header.

    Args:
        batches: columns `path` and `file` (its last part), `start` (the byte of the file at which the part of it
            begins that Spark reads in one go), `header` (which of `headers` the file has) and `line` (bytes, UTF-8).
        headers: column names.
    """
    part = None
    for batch in batches:
        path, file, start, header, line = (batch.column(n) for n in ("path", "file", "start", "header", "line"))
        for index in range(batch.num_rows):
            text = line[index].as_py().decode("utf-8", errors="replace")
            if not text.strip():
                continue
            previous, part = part, (path[index].as_py(), start[index].as_py())
            if part != previous and part[1] == 0:
                continue
            names = headers[header[index].as_py()]
            values = split_line(text)
            if values is None or len(values) != len(names):
                yield Record(file[index].as_py(), text, dict.fromkeys(names))
            else:
                yield Record(file[index].as_py(), None, {n: v or None for n, v in zip(names, values, strict=True)})


def split_line(line: str) -> list[str] | None:
    """The fields of a line by RFC 4180, or None where its quotes are wrong.

    It looks for commas and quotes only, where the csv module looks at every character: many times as fast on a picture.
    """
    fields, at = [], 0
    while True:
        if line.startswith('"', at):
            end = line.find('"', at + 1)
            while end >= 0 and line.startswith('"', end + 1):
                end = line.find('"', end + 2)
            if end < 0 or not (end + 1 == len(line) or line.startswith(",", end + 1)):
                return None
            fields.append(line[at + 1 : end].replace('""', '"'))
            at = end + 2
        else:
            end = line.find(",", at)
            fields.append(line[at:] if end < 0 else line[at:end])
            at = end + 1 if end >= 0 else len(line) + 1
        if at > len(line):
            return fields

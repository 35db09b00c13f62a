"""Records as their source holds them: the half of a reader that executors run. Nothing about a record is judged here.

Spark's own CSV parser takes half as long as decoding the pictures in its fields, so executors take lines as bytes and
split them themselves; Spark parses only where quotes may hold line breaks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from pipelines.executor.ingest.lines import Lines, given_lines

FILE = "_lakesight_file"
"""The column of a table that names the file of a row."""
Fields = dict[str, Any]
"""A row's columns: strings, numbers, bytes, lists and dictionaries, as the source has them."""

HALF_A_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


class Trouble(NamedTuple):
    """What kept a reader from reading a record: one of tables.REASONS, and what exactly."""

    reason: str
    detail: str


class Record(NamedTuple):
    """One record.

    Attributes:
        file: its file's name.
        fields: its columns.
        raw: the record as it was, where it could not be taken apart.
        trouble: why it could not be read.
        source_row: its name, where it has one already.
    """

    file: str
    fields: Fields
    raw: str | None = None
    trouble: Trouble | None = None
    source_row: str | None = None


Read = Callable[[Iterator[pa.RecordBatch]], Iterator[Record]]
"""Batches of a source's rows, in whatever columns its reader chose, to records."""


def _malformed(file: str, names: Sequence[str], raw: str) -> Record:
    detail = (
        f"not {len(names)} columns as in the header, or wrong quotes "
        "(line breaks inside quotes need data.source.multiline)"
    )
    return Record(file, dict.fromkeys(names), raw, Trouble("malformed_record", detail))


# ------------------------------------------------------------------------------------------------ tables


def table_records(batches: Iterator[pa.RecordBatch], image: str) -> Iterator[Record]:
    """Rows of a table. A picture that is a struct of bytes and path becomes two fields: IMAGE and IMAGE.path.

    Args:
        batches: the name of a row's file first, then the table's own columns.
        image: name of the column with pictures.
    """
    for batch in batches:
        names = batch.schema.names[1:]
        for file, *values in zip(*(_values(column) for column in batch.columns), strict=True):
            fields = dict(zip(names, values, strict=True))
            picture = fields.get(image)
            if isinstance(picture, dict) and "bytes" in picture:
                fields |= {image: picture["bytes"], f"{image}.path": picture.get("path")}
            yield Record(file, fields)


def _values(column: pa.Array) -> list[Any]:
    """A column as Python has it. Spark does not mind strings that are not UTF-8, Python does."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        if not pa.types.is_string(column.type):
            raise
        values = [v if v is None else v.decode(errors="replace") for v in column.cast(pa.binary()).to_pylist()]
    return values


def payload_records(batches: Iterator[pa.RecordBatch]) -> Iterator[Record]:
    """Rows of `quarantine` as the records they were. One that was no record then is none now.

    Args:
        batches: columns `source_row` and `payload`.
    """
    for batch in batches:
        for name, payload in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True):
            file, fields = name.rpartition("#")[0], json_object(payload)
            if isinstance(fields, Trouble):
                why = "the row could not be taken apart: mend it in its file and ingest that again"
                yield Record(file, {}, payload, Trouble("malformed_record", why), name)
            else:
                yield Record(file, fields, source_row=name)


# ------------------------------------------------------------------------------------------------ JSON lines


def json_records(batches: Iterator[pa.RecordBatch], lines: Lines = given_lines) -> Iterator[Record]:
    """Records of JSON lines. Blank lines are none.

    Args:
        batches: what `lines` takes.
        lines: reads lines of them.
    """
    for line in lines(batches):
        text = line.content.decode("utf-8", errors="replace").removeprefix("\ufeff")
        if not text.strip():
            continue
        fields = json_object(text)
        yield Record(line.file, {}, text, fields) if isinstance(fields, Trouble) else Record(line.file, fields)


def json_object(text: str) -> Fields | Trouble:
    """A JSON object, without the halves of characters that JSON can spell and UTF-8 cannot."""
    try:
        fields = json.loads(text)
        if HALF_A_CHARACTER.search(text):
            spelt = json.dumps(fields, ensure_ascii=False).encode("utf-16", "surrogatepass")
            fields = json.loads(spelt.decode("utf-16", "replace"))
    except (ValueError, RecursionError) as error:
        return Trouble("malformed_record", f"not JSON: {error}")
    return fields if isinstance(fields, dict) else Trouble("malformed_record", "JSON, but not an object")


# ------------------------------------------------------------------------------------------------ CSV


def parsed_records(batches: Iterator[pa.RecordBatch]) -> Iterator[Record]:
    """Records that Spark has parsed.

    Args:
        batches: columns `file`, `raw` and `row` (a map of the source's own columns to strings).
    """
    for batch in batches:
        for row in batch.to_pylist():
            fields = dict(row["row"])
            yield _malformed(row["file"], list(fields), row["raw"]) if row["raw"] else Record(row["file"], fields)


def csv_records(
    batches: Iterator[pa.RecordBatch], headers: Sequence[tuple[str, ...]], lines: Lines = given_lines
) -> Iterator[Record]:
    """Records of CSV lines. Blank lines are none, nor is the first other line of a file: the header.

    Args:
        batches: what `lines` takes.
        headers: column names.
        lines: reads lines of them.
    """
    part = None
    for line in lines(batches):
        text = line.content.decode("utf-8", errors="replace")
        if not text.strip():
            continue
        previous, part = part, (line.path, line.start)
        if part != previous and line.start == 0:
            continue
        names = headers[line.header]
        values = split_line(text)
        if values is None or len(values) != len(names):
            yield _malformed(line.file, names, text)
        else:
            yield Record(line.file, {n: v or None for n, v in zip(names, values, strict=True)})


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

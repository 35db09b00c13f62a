"""A record is one row of a source that is parsed but not yet validated."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from pipelines.executor.ingest.storage import printable
from pipelines.executor.ingest.values import is_missing

Fields = dict[str, Any]
"""Values of a row by column name. A value has the type that the source gives it, such as str, bytes or list."""

SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
"""Pattern of a JSON escape of a UTF-16 surrogate."""
ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<lone>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)
"""Pattern of an escape in a JSON string: a pair of UTF-16 surrogates, a lone surrogate, or another escape."""


class Problem(NamedTuple):
    """Problem of a row that could not be parsed, or of a row whose picture could not be read.

    `reason` is an element of `tables.REASONS`.
    """

    reason: str
    detail: str


class Record(NamedTuple):
    """One row of a source.

    Attributes:
        file: name of the row's file.
        fields: values of the row by column name.
        raw: text of the unparsed row, or None if the row could be parsed.
        problem: reason why the row cannot become a sample, or None.
        source_row: identifier of a replayed row of `quarantine`, or None for a row that has no identifier yet.
        others: function that reads the unused columns of the row, or None if `fields` has all columns. The function is
            called only if the row is refused or may be refused later, because `quarantine` stores the whole row.
    """

    file: str
    fields: Fields
    raw: str | None = None
    problem: Problem | None = None
    source_row: str | None = None
    others: Callable[[], Fields] | None = None


def add_partition(fields: Fields, partition: Mapping[str, str | None]) -> Fields:
    """Add the partition columns, whose values are in folder names such as `year=2024`, to the values of a row.

    If a row has a value for a partition column, this value replaces the value in the folder name.

    Args:
        fields: values of the row.
        partition: values of the partition columns, by column name.
    """
    return {**partition, **{name: v for name, v in fields.items() if name not in partition or not is_missing(v)}}


def unreadable_file(file: str, path: str, what: str) -> Record:
    """Return a record with the reason `unreadable_file` for a file that is damaged from some position on.

    Args:
        file: name of the file.
        path: full path of the file, which distinguishes files of the same name.
        what: description and place of the damage. Records with equal `path` and `what` have the same identifier.
    """
    return Record(file, {}, f"{path}: {what}", Problem("unreadable_file", what))


Read = Callable[[Iterator[pa.RecordBatch]], Iterator[Record]]
"""Type of a parser, which converts batches of raw rows to records. The columns of a raw row depend on the source."""


def refuse_denied(batches: Iterator[pa.RecordBatch], read: Read, denied: Collection[bytes]) -> Iterator[Record]:
    """Read raw rows that stand for files. Refuse files that the driver has no permission to read, without opening them.

    Args:
        batches: raw rows with the columns `path` and `file`, and with `start` if a row is a range of a file.
        read: parser of raw rows.
        denied: paths of the files that the driver may not read, encoded by os.fsencode.
    """
    for batch in batches:
        kept = []
        for index, row in enumerate(batch.to_pylist()):
            if os.fsencode(row["path"]) not in denied:
                kept.append(index)
            elif not row.get("start"):  # only the first range of a file counts
                path = printable(os.fsdecode(row["path"]))
                yield unreadable_file(row["file"], path, os.strerror(errno.EACCES))
        yield from read(iter([batch.take(pa.array(kept, pa.int64()))]))


def parse_integer(digits: str) -> int | str:
    """Parse an integer in JSON. An integer with more digits than Python converts is returned as text."""
    try:
        return int(digits)
    except ValueError:
        return digits


def replace_lone_surrogates(text: str) -> str:
    """Replace the escape of each lone UTF-16 surrogate in a JSON document by the escape of U+FFFD, because UTF-8 cannot
    encode a lone surrogate.
    """
    if not SURROGATE_ESCAPE.search(text):  # this search is much faster than the replacement
        return text
    return ESCAPE.sub(lambda found: "\\ufffd" if found["lone"] else found[0], text)


def parse_json_object(text: str) -> Fields | Problem:
    """Parse a JSON object, or return a Problem if the text is not a JSON object.

    A lone UTF-16 surrogate becomes U+FFFD.
    """
    try:
        fields = json.loads(replace_lone_surrogates(text), parse_int=parse_integer)
    except (ValueError, RecursionError) as error:
        return Problem("malformed_record", f"not JSON: {error}")
    return fields if isinstance(fields, dict) else Problem("malformed_record", "JSON, but not an object")

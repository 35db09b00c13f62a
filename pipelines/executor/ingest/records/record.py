"""A record: one row of a source, parsed but not yet validated."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa

Fields = dict[str, Any]
"""Columns of a row by name. Values have the source's types: strings, numbers, bytes, lists and dictionaries."""

SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
"""A JSON escape of half a UTF-16 surrogate pair."""


class Problem(NamedTuple):
    """Why a row could not be parsed: one of tables.REASONS, and the details."""

    reason: str
    detail: str


class Record(NamedTuple):
    """One row of a source.

    Attributes:
        file: name of the row's file.
        fields: columns of the row.
        raw: the unparsed row, if it could not be parsed.
        problem: why the row could not be parsed.
        source_row: the row's identifier, if it already has one (a replayed row of `quarantine`).
    """

    file: str
    fields: Fields
    raw: str | None = None
    problem: Problem | None = None
    source_row: str | None = None


Read = Callable[[Iterator[pa.RecordBatch]], Iterator[Record]]
"""A parser: it maps batches of a source's raw rows to records. The columns of the batches depend on the source."""


def parse_json_object(text: str) -> Fields | Problem:
    """Parse a JSON object. Lone UTF-16 surrogates become U+FFFD, because UTF-8 cannot encode them."""
    try:
        fields = json.loads(text)
        if SURROGATE_ESCAPE.search(text):
            utf16 = json.dumps(fields, ensure_ascii=False).encode("utf-16", "surrogatepass")
            fields = json.loads(utf16.decode("utf-16", "replace"))
    except (ValueError, RecursionError) as error:
        return Problem("malformed_record", f"not JSON: {error}")
    return fields if isinstance(fields, dict) else Problem("malformed_record", "JSON, but not an object")

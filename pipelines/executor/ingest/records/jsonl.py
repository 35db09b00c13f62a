"""Parser of JSON lines files, which contain one JSON object per line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import pyarrow as pa

from pipelines.executor.ingest.records.lines import (
    Layout,
    LongLine,
    Range,
    line_text,
    long_line_record,
    range_lines,
    range_records,
)
from pipelines.executor.ingest.records.record import Problem, Record, add_partition, parse_json_object

KEYS = pa.schema([("key", pa.string())])


def jsonl_records(batches: Iterator[pa.RecordBatch], layouts: Sequence[Layout], limit: int) -> Iterator[Record]:
    """Parse JSON lines. Blank lines are skipped.

    Args:
        batches: Arrow batches of the schema `lines.RANGE`.
        layouts: layouts of the files.
        limit: largest size of a line, in bytes.
    """
    return range_records(batches, layouts, partial(jsonl_range, limit=limit))


def jsonl_range(part: Range, limit: int) -> Iterator[Record]:
    """Parse the lines of one range."""
    for line in range_lines(part, limit):
        if isinstance(line, LongLine):
            yield long_line_record(part.file, {}, line, limit)
            continue
        text = line_text(line[0])
        if text.strip():
            fields = parse_json_object(text)
            if isinstance(fields, Problem):
                detail = f"{fields.detail}. Each line must be one JSON object (`jq -c '.[]'` converts a JSON array)"
                yield Record(part.file, {}, text, fields._replace(detail=detail))
            else:
                yield Record(part.file, add_partition(fields, part.partition))


def find_keys(
    batches: Iterator[pa.RecordBatch], layouts: Sequence[Layout], limit: int, wanted: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """Yield the wanted keys that appear in at least one object of the ranges, as batches of the schema KEYS."""
    missing = set(wanted)
    for record in jsonl_records(batches, layouts, limit):
        if found := missing & record.fields.keys():
            missing -= found
            yield pa.RecordBatch.from_pylist([{"key": key} for key in sorted(found)], KEYS)
            if not missing:
                return

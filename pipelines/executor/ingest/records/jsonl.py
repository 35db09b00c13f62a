"""Parser of JSON lines files, which hold one JSON object per line."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from pipelines.executor.ingest.records.lines import Lines, spark_lines
from pipelines.executor.ingest.records.record import Problem, Record, parse_json_object


def jsonl_records(batches: Iterator[pa.RecordBatch], lines: Lines = spark_lines) -> Iterator[Record]:
    """Parse JSON lines. Blank lines are skipped.

    Args:
        batches: input of `lines`.
        lines: function that reads lines from the batches.
    """
    for line in lines(batches):
        text = line.content.decode("utf-8", errors="replace").removeprefix("\ufeff")
        if not text.strip():
            continue
        fields = parse_json_object(text)
        yield Record(line.file, {}, text, fields) if isinstance(fields, Problem) else Record(line.file, fields)

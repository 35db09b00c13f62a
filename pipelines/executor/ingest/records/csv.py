"""Parsers of CSV rows.

Parsing a row with Spark's CSV parser takes half as long as decoding the row's picture. Python workers therefore receive
lines as bytes and split the lines here. Spark parses a CSV file only if its quoted fields may contain line breaks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from pipelines.executor.ingest.records.lines import Lines, spark_lines
from pipelines.executor.ingest.records.record import Problem, Record


def csv_records(
    batches: Iterator[pa.RecordBatch], headers: Sequence[tuple[str, ...]], lines: Lines = spark_lines
) -> Iterator[Record]:
    """Parse CSV lines. Blank lines and the header (the first line of a file that is not blank) are skipped.

    Args:
        batches: input of `lines`.
        headers: list of headers, each a tuple of column names; `Line.header` is an index into the list.
        lines: function that reads lines from the batches.
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


def spark_csv_records(batches: Iterator[pa.RecordBatch]) -> Iterator[Record]:
    """Convert CSV rows that Spark has parsed to records.

    Args:
        batches: batches with the columns `file`, `raw` (the line if Spark could not parse the line, else null) and
            `row` (a map from column name to string).
    """
    for batch in batches:
        for row in batch.to_pylist():
            fields = dict(row["row"])
            yield _malformed(row["file"], list(fields), row["raw"]) if row["raw"] else Record(row["file"], fields)


def split_line(line: str) -> list[str] | None:
    """Split a line into fields by RFC 4180. Return None if the quotes of the line are wrong.

    This function jumps from one comma or quote to the next. Python's csv module looks at every character, so it is many
    times slower on base64 pictures.
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


def _malformed(file: str, names: Sequence[str], raw: str) -> Record:
    detail = (
        f"not {len(names)} columns as in the header, or wrong quotes "
        "(line breaks inside quotes need data.source.multiline)"
    )
    return Record(file, dict.fromkeys(names), raw, Problem("malformed_record", detail))

"""Parser of CSV rows with any delimiter and any line end, and optionally with line breaks inside quoted fields.

Spark's CSV parser takes half as long to parse a row as the decoder takes to decode the row's picture. Python's csv
module is slow too, because the module looks at every character. Therefore, Python workers read the bytes of the files,
and search for the next delimiter or quote.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import AnyStr, Generic, NamedTuple

import pyarrow as pa

from pipelines.executor.ingest.records.lines import (
    WHOLE,
    Layout,
    LongLine,
    Range,
    line_text,
    long_line_record,
    range_lines,
    range_records,
)
from pipelines.executor.ingest.records.record import Problem, Record, add_partition

MAX_LINES_OF_ROW = 100_000
"""Largest number of lines in one row whose quoted fields contain line breaks."""
MAX_BROKEN_LINES = 100
"""If fields may not contain line breaks, the parser searches at most this number of lines for a missing closing quote.
"""
NEAR_BYTES = 4 * 2**20
"""Number of bytes before and after a range in which the parser searches for quoted fields that cross the range's
borders.
"""


class _Quoting(NamedTuple, Generic[AnyStr]):
    """Characters of a CSV file: delimiter of the fields, quote and escape character.

    Quote and escape character may be empty.
    """

    delimiter: AnyStr
    quote: AnyStr
    escape: AnyStr


def csv_records(
    batches: Iterator[pa.RecordBatch], layouts: Sequence[Layout], *, multiline: bool, limit: int
) -> Iterator[Record]:
    """Parse the rows of CSV files. Blank lines are skipped.

    Args:
        batches: Arrow batches of the schema `lines.RANGE`.
        layouts: layouts of the files, with the column names.
        multiline: whether quoted fields may contain line breaks; if true, every range is a whole file.
        limit: largest size of a row, in bytes.
    """
    return range_records(batches, layouts, partial(_csv_range, multiline=multiline, limit=limit))


def _csv_range(part: Range, *, multiline: bool, limit: int) -> Iterator[Record]:
    names, delimiter = part.layout.names, part.layout.delimiter
    rows = ((row, False) for row in csv_rows(part, multiline=True, limit=limit)) if multiline else _lines(part, limit)
    for _ in range(part.layout.skip if part.start == 0 else 0):
        next(rows, None)
    for row, broken in rows:
        if isinstance(row, LongLine):
            yield long_line_record(part.file, dict.fromkeys(names), row, limit)
        elif not is_blank(row, delimiter):
            values = None if broken else split_line(row, delimiter, part.layout.escape, part.layout.quote)
            if values is None or len(values) < len(names) or any(values[len(names) :]):
                yield _malformed(part.file, names, row, values)
            else:  # empty fields after the last column come from a program that ends each row with a delimiter
                fields = {name: value or None for name, value in zip(names, values, strict=False)}
                yield Record(part.file, add_partition(fields, part.partition))


def csv_rows(part: Range, *, multiline: bool, limit: int) -> Iterator[str | LongLine]:
    """Yield the rows of a range as text, without line ends. The layout of the range does not need column names."""
    quoting = _Quoting(*(text.encode() for text in (part.layout.delimiter, part.layout.quote, part.layout.escape)))
    lines = range_lines(part, limit)
    for row in _join_quoted(lines, quoting, None if multiline else part.layout.separator, limit):
        yield row if isinstance(row, LongLine) else line_text(row)


def _lines(part: Range, limit: int) -> Iterator[tuple[str | LongLine, bool]]:
    """Yield each row of a range with a flag that says whether the row begins inside a quoted field.

    The line separator of the layout always ends a row, even inside quotes.

    The lines shortly before and after the range are read too, so that the result does not depend on the borders of
    ranges. A quote that is never closed affects only its own line.
    """
    quoting = _Quoting(part.layout.delimiter, part.layout.quote, part.layout.escape)
    rows = _rows_near(part, limit)
    waiting: deque[tuple[int, str | LongLine]] = deque()
    broken = 0
    while (found := waiting.popleft() if waiting else next(rows, None)) is not None:
        place, row = found
        if place > 0:
            return
        if place == 0:
            yield row, broken > 0
        if broken:
            broken -= 1
        elif isinstance(row, str) and _ends_in_quotes(row, quoting, opened=False):
            broken = _count_broken(_look_ahead(waiting, rows), quoting)


def _rows_near(part: Range, limit: int) -> Iterator[tuple[int, str | LongLine]]:
    """Yield the rows in and near a range, each with its place.

    The place is -1 for a row shortly before the range, 0 for a row in the range, and 1 for a row shortly after the
    range.
    """
    parts = {0: part}
    if part.start:
        parts = {-1: part._replace(start=max(0, part.start - NEAR_BYTES), end=part.start), **parts}
    if part.end != WHOLE:
        parts[1] = part._replace(start=part.end, end=part.end + NEAR_BYTES)
    for place, near in parts.items():
        for row in csv_rows(near, multiline=False, limit=limit):
            yield place, row


def _look_ahead(
    waiting: deque[tuple[int, str | LongLine]], rows: Iterator[tuple[int, str | LongLine]]
) -> Iterator[str | LongLine]:
    """Yield the following rows without consuming them: each row that is read from `rows` is appended to `waiting`."""
    yield from [row for _, row in waiting]
    for place, row in rows:
        waiting.append((place, row))
        yield row


def _count_broken(following: Iterable[str | LongLine], quoting: _Quoting[str]) -> int:
    """Return how many lines after an open quote belong to the quoted field.

    Return 0 if the quote is not closed in the next MAX_BROKEN_LINES lines and NEAR_BYTES characters.
    """
    size = 0
    for count, row in enumerate(following, 1):
        size += len(row) if isinstance(row, str) else row.size
        if isinstance(row, LongLine) or count > MAX_BROKEN_LINES or size > NEAR_BYTES:
            return 0
        inside = f"{quoting.quote} {row}"
        if split_line(inside, quoting.delimiter, quoting.escape, quoting.quote) is not None:
            return count
        if not _ends_in_quotes(inside, quoting, opened=False):
            return 0
    return 0


def is_blank(row: str, delimiter: str) -> bool:
    """Return whether a row contains only white space and no delimiter (a tab may be the delimiter)."""
    return not row.strip() and delimiter not in row


def _join_quoted(
    lines: Iterator[tuple[bytes, bytes] | LongLine], quoting: _Quoting[bytes], last: bytes | None, limit: int
) -> Iterator[bytes | LongLine]:
    """Join lines into one row if a quoted field contains their line ends.

    If a quote is never closed, the line with this quote becomes a row, and the next lines are parsed as rows of their
    own. Without this rule, the field after a quote that is never closed would contain the rest of the file.

    Args:
        lines: lines with their line ends.
        quoting: delimiter, quote and escape character.
        last: line end that always ends a row, or None if every line end may be inside quotes.
        limit: largest size of a row, in bytes.
    """
    waiting: deque[tuple[bytes, bytes] | LongLine] = deque()

    def following() -> tuple[bytes, bytes] | LongLine | None:
        return waiting.popleft() if waiting else next(lines, None)

    while (line := following()) is not None:
        if isinstance(line, LongLine):
            yield line
            continue
        row, size = [line], len(line[0])
        # If a line ends with `last`, the row cannot continue, so the quotes of the line are checked only later, in
        # `split_line`.
        opened = line[1] != last and _ends_in_quotes(line[0], quoting, opened=False)
        while opened and size <= limit and len(row) < MAX_LINES_OF_ROW and row[-1][1] != last:
            line = following()
            if line is None:
                break
            if isinstance(line, LongLine):
                waiting.appendleft(line)
                break
            row.append(line)
            size += len(line[0])
            opened = _ends_in_quotes(line[0], quoting, opened=True)
        if opened:
            waiting.extendleft(reversed(row[1:]))
        yield row[0][0] if opened or len(row) == 1 else b"".join(part for pair in row for part in pair)


def _ends_in_quotes(line: AnyStr, quoting: _Quoting[AnyStr], *, opened: bool) -> bool:
    """Return whether a line ends inside a quoted field. `opened` says whether the line begins inside a quoted field."""
    delimiter, quote, escape = quoting
    if not quote or (not opened and quote not in line):
        return False
    at = 0
    while True:
        if opened or line.startswith(quote, at):
            end = _find_closing_quote(line, at if opened else at + 1, quote, escape)
            if end < 0:
                return True
            if not line.startswith(delimiter, end + 1):
                return False
            opened, at = False, end + 1 + len(delimiter)
        else:
            end = line.find(delimiter, at)
            if end < 0:
                return False
            at = end + len(delimiter)


def split_line(line: str, delimiter: str = ",", escape: str = "", quote: str = '"') -> list[str] | None:
    """Split a row into fields by RFC 4180. Return None if the quotes of the row are wrong.

    If `quote` is empty, every delimiter separates two fields, and quotes are ordinary characters.

    In a quoted field, the escape character (which Spark uses in CSV files) precedes a quote or another escape
    character. In a field without quotes, the escape character has no special meaning.

    A field that does not begin with a quote may contain quotes, as in `5" pipe`, although the standard forbids these
    quotes. However, a row is wrong if a field without an opening quote has an odd number of quotes and ends with a
    quote that does not follow a digit. The field is probably the end of a quoted field that began in an earlier line. A
    quote after a digit is allowed, because the quote may mean inches.
    """
    if not quote:
        return line.split(delimiter)
    fields, at = [], 0
    while True:
        if line.startswith(quote, at):
            end = _find_closing_quote(line, at + 1, quote, escape)
            if end < 0 or not (end + 1 == len(line) or line.startswith(delimiter, end + 1)):
                return None
            fields.append(_unescape(line[at + 1 : end], escape, quote))
            at = end + 2
        else:
            end = line.find(delimiter, at)
            fields.append(line[at:] if end < 0 else line[at:end])
            if _ends_quotes(fields[-1], quote):
                return None
            at = end + 1 if end >= 0 else len(line) + 1
        if at > len(line):
            return fields


def _ends_quotes(field: str, quote: str) -> bool:
    """Return whether a field without an opening quote probably ends a quoted field that began in an earlier line."""
    return field.endswith(quote) and field.count(quote) % 2 == 1 and not field[-2].isnumeric()


def _find_closing_quote(line: AnyStr, start: int, quote: AnyStr, escape: AnyStr) -> int:
    """Return the position of the quote that closes the field at `start`, or -1 if no quote closes the field.

    Two consecutive quotes, and a quote after an escape character, do not close the field but stand for one quote.
    """
    end = line.find(quote, start)
    while end >= 0:
        escapes = end - len(line[start:end].rstrip(escape)) - start if escape else 0
        if escapes % 2:
            end = line.find(quote, end + 1)
        elif line.startswith(quote, end + 1):
            end = line.find(quote, end + 2)
        else:
            return end
    return end


def _unescape(text: str, escape: str, quote: str) -> str:
    """Return the value of a quoted field, given the text between the opening and the closing quote."""
    if not escape:
        return text.replace(2 * quote, quote)
    escape, quote = re.escape(escape), re.escape(quote)
    return re.sub(f"{escape}({escape}|{quote})|{quote}({quote})", r"\1\2", text)


def _malformed(file: str, names: Sequence[str], raw: str, values: Sequence[str] | None) -> Record:
    """Return the record of a row that does not fit the header. `values` is None if the quotes of the row are wrong."""
    if values is None:
        detail = (
            'wrong quotes (line breaks inside quotes need data.source.multiline, \\" needs data.source.escape, and a '
            "file in which quotes are ordinary characters needs data.source.quote=null)"
        )
    else:
        detail = f"{len(values)} fields, but the header of the file has {len(names)} columns"
    return Record(file, dict.fromkeys(names), raw, Problem("malformed_record", detail))

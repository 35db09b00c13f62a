"""Lines become records by RFC 4180, headers and blank lines do not, and a line that is none is kept as it was."""

from __future__ import annotations

import csv
import io

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.executor.records import Record, csv_records, split_line

HEADERS = (("id", "text"), ("text", "picture", "id"))
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("file", pa.string()),
        ("start", pa.int64()),
        ("header", pa.int32()),
        ("line", pa.binary()),
    ]
)


def records(*lines: tuple[str, int, int, bytes]) -> list[Record]:
    """Records of lines given as path, start, header and line, in batches of two."""
    rows = [
        {"path": path, "file": path.rpartition("/")[2], "start": start, "header": header, "line": line}
        for path, start, header, line in lines
    ]
    batches = (pa.RecordBatch.from_pylist(rows[n : n + 2], SCHEMA) for n in range(0, len(rows), 2))
    return list(csv_records(batches, HEADERS))


@given(st.lists(st.text(st.characters(exclude_characters="\r\n\0", codec="utf-8")), min_size=1))
def test_what_a_csv_writer_writes_is_read(fields: list[str]) -> None:
    file = io.StringIO()
    csv.writer(file, lineterminator="").writerow(fields)
    assert split_line(file.getvalue()) == fields


@given(st.text(st.sampled_from('",ab '), min_size=1))
def test_any_line_is_read_as_the_csv_module_reads_it_or_refused(line: str) -> None:
    fields = split_line(line)
    try:
        [expected] = csv.reader([line], strict=True)
    except csv.Error:
        assert fields is None
    else:
        assert fields == expected


@pytest.mark.parametrize("line", ['"', '"a', 'a,"b', '"a"b', '"a" ,b', '"""'])
def test_wrong_quotes_are_refused(line: str) -> None:
    assert split_line(line) is None


def test_headers_and_blank_lines_are_no_records() -> None:
    lines = [
        ("in/a.csv", 0, 0, b""),
        ("in/a.csv", 0, 0, b"id,text"),
        ("in/a.csv", 0, 0, b"1,one"),
        ("in/a.csv", 0, 0, b" "),
        ("in/a.csv", 0, 0, b"id,text"),
        ("in/a.csv", 99, 0, b"2,two"),
        ("in/b/a.csv", 0, 1, b"text,picture,id"),
        ("in/b/a.csv", 0, 1, b'three,,"3"'),
        ("in/c.csv", 50, 0, b"4,four"),
    ]
    assert records(*lines) == [
        Record("a.csv", None, {"id": "1", "text": "one"}),
        Record("a.csv", None, {"id": "id", "text": "text"}),
        Record("a.csv", None, {"id": "2", "text": "two"}),
        Record("a.csv", None, {"text": "three", "picture": None, "id": "3"}),
        Record("c.csv", None, {"id": "4", "text": "four"}),
    ]


@pytest.mark.parametrize("line", [b"1", b"1,one,more", b'1,"one', b'"1"x,one'])
def test_a_line_that_is_no_record_is_kept_as_it_was(line: bytes) -> None:
    [record] = records(("a.csv", 7, 0, line))
    assert record.raw == line.decode()


def test_bytes_that_are_not_utf_8_stay_in_their_row() -> None:
    bad, good = records(("a.csv", 7, 0, b"1,caf\xe9"), ("a.csv", 7, 0, "2,caf\u00e9".encode()))
    assert (bad.fields["text"], good.fields["text"]) == ("caf\ufffd", "caf\u00e9")

"""Tests of the parsers of CSV, JSON lines and tables: every row becomes a record, and a bad row keeps its raw text."""

from __future__ import annotations

import csv
import io
import os
import re
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.executor.ingest.records.csv import csv_records, split_line
from pipelines.executor.ingest.records.jsonl import jsonl_range
from pipelines.executor.ingest.records.lines import RANGE, WHOLE, Layout, Range
from pipelines.executor.ingest.records.record import Record
from pipelines.executor.ingest.records.table import add_image_ids, delta_records, payload_records

LIMIT = 10**6


def parse(
    folder: Path, content: bytes, *, multiline: bool = False, start: int = 0, stop: int | None = None, **layout: Any
) -> list[Record]:
    """Parse the rows of a CSV file whose layout is known."""
    path = folder / "a.csv"
    path.write_bytes(content)
    form = Layout(**{"names": ("id", "text")} | layout)
    end = WHOLE if multiline else stop or len(content)
    row = {"path": os.fsencode(path), "file": path.name, "start": start, "end": end, "layout": 1, "partition": "{}"}
    batch = pa.RecordBatch.from_pylist([row], RANGE)
    return list(csv_records(iter([batch]), [Layout(), form], multiline=multiline, limit=LIMIT))


def fields(records: list[Record]) -> list[tuple[Any, ...]]:
    """Return the values of records, or the raw text of a record that could not be parsed."""
    return [tuple(record.fields.values()) if record.problem is None else (record.raw,) for record in records]


@given(st.lists(st.text(st.characters(exclude_characters="\r\n\0", codec="utf-8")), min_size=1))
def test_a_csv_line_that_python_wrote_is_split_into_its_fields(fields: list[str]) -> None:
    file = io.StringIO()
    csv.writer(file, lineterminator="").writerow(fields)
    assert split_line(file.getvalue()) == fields


def spark_field(text: str) -> str:
    """Write a field as Spark's CSV writer does (tests/spark/test_ingest.py compares with Spark itself)."""
    if not {'"', ","} & set(text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


@given(st.lists(st.text(st.sampled_from('",\\ab '), min_size=1), min_size=1))
def test_a_csv_line_that_spark_wrote_is_split_into_its_fields_with_backslash_as_escape_character(
    fields: list[str],
) -> None:
    assert split_line(",".join(map(spark_field, fields)), escape="\\") == fields


@given(st.text(st.sampled_from('",ab '), min_size=1))
def test_a_csv_line_is_split_exactly_as_the_csv_module_splits_it_or_is_not_split(line: str) -> None:
    fields = split_line(line)
    try:
        [expected] = csv.reader([line], strict=True)
    except csv.Error:
        assert fields is None
    else:
        if fields is None:  # `split_line` refuses an unquoted field that ends with a quote
            assert re.search(r'[^",][^,]*"(,|$)', line)
            return
        assert fields == expected


@given(st.lists(st.text(st.characters(exclude_characters="\t\r\n\0", codec="utf-8")), min_size=1))
def test_without_a_quote_character_every_delimiter_separates_two_fields(fields: list[str]) -> None:
    assert split_line("\t".join(fields), "\t", quote="") == fields


@given(st.lists(st.text(st.sampled_from("',\"ab ")), min_size=1))
def test_a_csv_line_with_another_quote_character_is_split_into_its_fields(fields: list[str]) -> None:
    file = io.StringIO()
    csv.writer(file, lineterminator="", quotechar="'", quoting=csv.QUOTE_ALL).writerow(fields)
    assert split_line(file.getvalue(), quote="'") == fields


def test_quotes_are_ordinary_characters_in_a_file_without_a_quote_character(tmp_path: Path) -> None:
    texts = ['"the quick brown fox', 'the end"', '"quoted" word', '"', '5" pipe']
    content = "".join(f"{n}\t{text}\n" for n, text in enumerate(texts)).encode()
    records = parse(tmp_path, content, delimiter="\t", quote="")
    assert fields(records) == [(str(n), text) for n, text in enumerate(texts)]
    problems = [record.problem for record in parse(tmp_path, content, delimiter="\t")]
    assert any("data.source.quote=null" in problem.detail for problem in problems if problem)


def test_empty_fields_after_the_last_column_are_dropped_and_other_surplus_fields_are_refused(tmp_path: Path) -> None:
    records = parse(tmp_path, b'1,one,\n2,two,,\n3,three,""\n4,four, \n5\n')
    assert fields(records) == [("1", "one"), ("2", "two"), ("3", "three"), ("4,four, ",), ("5",)]
    details = [record.problem.detail for record in records if record.problem]
    assert details == [f"{n} fields, but the header of the file has 2 columns" for n in (3, 1)]


@pytest.mark.parametrize("line", ['"', '"a', 'a,"b', '"a"b', '"a" ,b', '"""'])
def test_a_csv_line_with_misplaced_quotes_is_not_split_into_fields(line: str) -> None:
    assert split_line(line) is None


def test_the_header_rows_of_a_csv_file_and_its_blank_rows_are_skipped(tmp_path: Path) -> None:
    content = b"\n\xef\xbb\xbfid,text\n1,one\n \nid,text\n\xef\xbb\xbf2,\n"
    assert fields(parse(tmp_path, content, skip=2)) == [("1", "one"), ("id", "text"), ("2", None)]
    assert fields(parse(tmp_path, content, skip=2, start=20)) == [("id", "text"), ("2", None)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", "\u00a6"])
def test_csv_lines_with_every_line_end_and_delimiter_are_read(tmp_path: Path, end: str, delimiter: str) -> None:
    lines = [["1", "one"], ["2", f'"a{delimiter}b ""c"""'], ["", ""], ["3", "three"]]
    content = end.join(delimiter.join(line) for line in lines).encode()
    separator = b"\r" if end == "\r" else b"\n"
    for multiline in (False, True):
        records = parse(tmp_path, content, multiline=multiline, delimiter=delimiter, separator=separator)
        assert fields(records) == [("1", "one"), ("2", f'a{delimiter}b "c"'), (None, None), ("3", "three")]


def test_one_csv_file_may_mix_line_ends_and_a_quoted_carriage_return_belongs_to_the_text(tmp_path: Path) -> None:
    content = b'1,one\r2,"a\rb"\r\n3,three\n4,four\r'
    expected = [("1", "one"), ("2", "a\rb"), ("3", "three"), ("4", "four")]
    assert fields(parse(tmp_path, content)) == expected
    assert fields(parse(tmp_path, content, multiline=True)) == expected
    assert fields(parse(tmp_path, content, multiline=True, separator=b"\r")) == expected


@settings(max_examples=100)
@given(
    st.lists(st.lists(st.text(st.sampled_from('ab",;\n\r')), min_size=2, max_size=2), max_size=6),
    st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_line_breaks_in_quotes_are_read_as_by_the_csv_module(rows: list[list[str]], end: str) -> None:
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator=end, quoting=csv.QUOTE_ALL).writerows(rows)
    separator = b"\r" if end == "\r" else b"\n"
    with TemporaryDirectory() as folder:
        records = parse(Path(folder), file.getvalue().encode(), multiline=True, separator=separator)
    assert fields(records) == [tuple(value or None for value in row) for row in rows]


def test_a_quote_that_is_never_closed_damages_only_its_own_line(tmp_path: Path) -> None:
    content = b'1,one\n2,"open\n3,three\n4,four\n'
    assert fields(parse(tmp_path, content, multiline=True)) == [
        ("1", "one"),
        ('2,"open',),
        ("3", "three"),
        ("4", "four"),
    ]


BROKEN = [
    (b'"a cat\non a mat",B64\n"a ""dog""\nred, brown\n\nand old\n",B64\n1,one\n', [("1", "one")]),
    (b'B64,"a cat\non, a mat"\n2,two\n', [("2", "two")]),
    (b'1,"a\n2,b","c\nd, e"\r\n3,three\n', [("3", "three")]),
    (b'1,"open\n2,two\n3,"three"\n', [("2", "two"), ("3", "three")]),
    (b'1,"open\n' + b"2,two\n" * 200 + b'3,4"\n', [("2", "two")] * 200 + [("3", '4"')]),
    (
        b'1,5" pipe\n2,a 27"\n3,the "red" "cat"\n4,on a mat"\n',
        [("1", '5" pipe'), ("2", 'a 27"'), ("3", 'the "red" "cat"')],
    ),
]
"""CSV files with misplaced quotes, and the rows that a parser without `multiline` accepts."""


@pytest.mark.parametrize(("content", "expected"), BROKEN, ids=["tails", "last", "twice", "stray", "far", "inches"])
@pytest.mark.parametrize("size", [7, 10**6])
def test_a_line_that_begins_inside_a_quoted_field_is_refused_wherever_the_byte_ranges_begin(
    tmp_path: Path, content: bytes, expected: list[tuple[str, str]], size: int
) -> None:
    starts = range(0, len(content), size)
    records = [one for at in starts for one in parse(tmp_path, content, start=at, stop=min(at + size, len(content)))]
    assert [tuple(record.fields.values()) for record in records if not record.problem] == expected
    refused = [record for record in records if record.problem]
    assert {record.problem.reason for record in refused if record.problem} == {"malformed_record"}
    assert len(records) == sum(1 for line in content.splitlines() if line)


@pytest.mark.parametrize("line", [b"1", b"1,one,more", b'1,"one', b'"1"x,one'])
def test_a_refused_malformed_csv_line_keeps_its_raw_text(tmp_path: Path, line: bytes) -> None:
    [record] = parse(tmp_path, line)
    assert record.raw == line.decode()
    assert record.problem is not None
    assert record.problem.reason == "malformed_record"


def test_a_csv_line_over_the_limit_is_one_refused_row_and_all_other_lines_are_read(tmp_path: Path) -> None:
    first, long, last = parse(tmp_path, b"1,one\n2," + b"x" * (LIMIT + 2**20) + b"\n3,three")
    assert fields([first, last]) == [("1", "one"), ("3", "three")]
    assert long.problem is not None
    assert (long.problem.reason, len(long.raw or "") < 70_000) == ("too_large", True)


def test_invalid_utf_8_in_a_csv_line_changes_only_the_row_of_this_line(tmp_path: Path) -> None:
    bad, good = parse(tmp_path, b"1,caf\xe9\n" + "2,caf\u00e9".encode())
    assert (bad.fields["text"], good.fields["text"]) == ("caf\ufffd", "caf\u00e9")


# ------------------------------------------------------------------------------------------------ JSON lines


def json_lines(*lines: bytes) -> list[Record]:
    with TemporaryDirectory() as folder:
        path = Path(folder, "a.jsonl")
        path.write_bytes(b"\n".join(lines))
        return list(jsonl_range(Range(str(path), path.name, 0, WHOLE, Layout(), {}), LIMIT))


def test_every_json_line_is_parsed_and_blank_lines_are_skipped() -> None:
    lines = [b'\xef\xbb\xbf{"a": 1, "b": ["x", null]}', b" ", b'{"a": "caf\xe9"}', rb'{"a": "\ud83d\ude00 \ud800"}']
    assert [record.fields for record in json_lines(*lines)] == [
        {"a": 1, "b": ["x", None]},
        {"a": "caf\ufffd"},
        {"a": "\U0001f600 \ufffd"},
    ]


def test_a_json_line_with_an_integer_of_any_length_is_read() -> None:
    digits = "7" * 5_000
    line = rf'{{"text": "\ud800", "n": {digits}, "m": [-{digits}, 2]}}'
    [record] = json_lines(line.encode())
    assert record.fields == {"text": "\ufffd", "n": digits, "m": [f"-{digits}", 2]}


@pytest.mark.parametrize("line", [b'{"a": 1', b"[1]", b"7", b"[" * 100_000, b"{'a': 1}"])
def test_a_refused_malformed_json_line_keeps_its_raw_text(line: bytes) -> None:
    bad, good = json_lines(line, b'{"a": 1}')
    assert (bad.raw, bad.fields) == (line.decode(), {})
    assert bad.problem is not None
    assert bad.problem.reason == "malformed_record"
    assert good == Record("a.jsonl", {"a": 1})


# ------------------------------------------------------------------------------------------------ tables


def test_table_rows_keep_their_types_and_an_image_struct_becomes_two_fields() -> None:
    pictures = [{"bytes": b"p", "path": "a.png"}, {"bytes": None, "path": "b.png"}, None]
    columns = {"file": ["x"] * 3, "image": pictures, "text": [["a"], None, []], "n": [1, 2, 3], "others": [None] * 3}
    batch = pa.RecordBatch.from_pydict(columns)
    records = list(delta_records(iter([batch]), ("image", "text", "n"), "image"))
    assert [record.fields for record in records] == [
        {"image": b"p", "image.path": "a.png", "text": ["a"], "n": 1},
        {"image": None, "image.path": "b.png", "text": None, "n": 2},
        {"image": None, "text": [], "n": 3},
    ]


def test_invalid_utf_8_in_a_table_changes_only_its_own_row() -> None:
    binary = pa.array([b"caf\xe9", None, b"x"])
    strings = pa.Array.from_buffers(pa.string(), 3, binary.buffers())  # Spark does not validate UTF-8
    columns = [pa.array(["x"] * 3), strings, pa.nulls(3)]
    batch = pa.RecordBatch.from_arrays(columns, names=["file", "text", "others"])
    records = delta_records(iter([batch]), ("text",), "image")
    assert [record.fields["text"] for record in records] == ["caf\ufffd", None, "x"]


def test_the_stored_text_of_a_refused_row_can_be_parsed_again() -> None:
    payloads = {"source_row": ["a#b.csv#0f", "a.csv#1e"], "payload": ['{"id": "1"}', '1,"x']}
    good, bad = payload_records(iter([pa.RecordBatch.from_pydict(payloads)]))
    assert good == Record("a#b.csv", {"id": "1"}, source_row="a#b.csv#0f")
    assert (bad.raw, bad.source_row, bad.problem is None) == ('1,"x', "a.csv#1e", False)


def test_unused_columns_of_a_delta_table_are_read_only_for_refused_rows_and_may_hold_invalid_values() -> None:
    far, kind = 400_000_000_000_000_000, pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    others = pa.StructArray.from_arrays(
        [
            pa.array([1, 2]),
            pa.array([far, 0], pa.timestamp("us")),
            pa.array([b"caf\xe9", b"ok"]).view(pa.string()),
            pa.array([[far], None], pa.list_(pa.timestamp("us"))),
        ],
        names=["n", "a.time", "a.time`", "times"],
    )
    image = pa.array([{"bytes": b"png", "path": "p"}, None], kind)
    batch = pa.RecordBatch.from_arrays(
        [pa.array(["t", "t"]), pa.array([1.0, 2.0]), image, others], names=["file", "used_0", "used_1", "others"]
    )
    first, second = delta_records(iter([batch]), names=("k.id", "image"), image="image")
    assert first.fields == {"k.id": 1.0, "image": b"png", "image.path": "p"}
    assert (second.file, second.fields) == ("t", {"k.id": 2.0, "image": None})
    assert first.others
    assert second.others
    unreadable = first.others()
    assert (unreadable["n"], unreadable["a.time`"]) == (1, "caf\ufffd")
    assert "14645" in unreadable["a.time"]
    assert "14645" in unreadable["times"][0]
    assert second.others() == {"n": 2, "a.time": datetime(1970, 1, 1), "a.time`": "ok", "times": None}
    alone = pa.RecordBatch.from_arrays([pa.array(["t"]), pa.array(["x"]), pa.array([None], pa.string())], list("abc"))
    [record] = delta_records(iter([alone]), names=("text",), image="image")
    assert record.others
    assert record.others() == {}


def test_ids_of_a_delta_table_become_image_ids_in_the_same_way_as_ids_of_decoded_rows() -> None:
    values = pa.array([5.0, 4.5, None, float("nan"), float("inf")])
    [batch] = add_image_ids(iter([pa.RecordBatch.from_arrays([values], ["key"])]), source="birds")
    assert batch.to_pylist() == [{"key": 5.0, "image_id": "birds/5"}, {"key": 4.5, "image_id": "birds/4.5"}]
    texts = pa.array([" 7 ", "", "\ufeff", "x" * 10_000, "a\u0301"])
    [batch] = add_image_ids(iter([pa.RecordBatch.from_arrays([texts], ["key"])]), source="birds")
    assert batch["image_id"].to_pylist() == ["birds/7", "birds/\u00e1"]

"""Tests of the parsers of CSV, JSON lines and tables: every row becomes a record, and a bad row keeps its raw text."""

from __future__ import annotations

import csv
import io
from datetime import datetime

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.executor.ingest.records.csv import csv_records, spark_csv_records, split_line
from pipelines.executor.ingest.records.jsonl import jsonl_records
from pipelines.executor.ingest.records.record import Record
from pipelines.executor.ingest.records.table import FILE, add_image_ids, delta_records, payload_records, table_records

HEADERS = (("id", "text"), ("text", "picture", "id"))
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("file", pa.string()),
        ("start", pa.int64()),
        ("header", pa.int32()),
        ("content", pa.binary()),
    ]
)


def records(*lines: tuple[str, int, int, bytes]) -> list[Record]:
    """Parse lines, given as path, start, header and content, in batches of two."""
    rows = [
        {"path": path, "file": path.rpartition("/")[2], "start": start, "header": header, "content": line}
        for path, start, header, line in lines
    ]
    batches = (pa.RecordBatch.from_pylist(rows[n : n + 2], SCHEMA) for n in range(0, len(rows), 2))
    return list(csv_records(batches, HEADERS))


@given(st.lists(st.text(st.characters(exclude_characters="\r\n\0", codec="utf-8")), min_size=1))
def test_output_of_a_csv_writer_is_split_into_its_fields(fields: list[str]) -> None:
    file = io.StringIO()
    csv.writer(file, lineterminator="").writerow(fields)
    assert split_line(file.getvalue()) == fields


@given(st.text(st.sampled_from('",ab '), min_size=1))
def test_a_csv_line_is_split_as_by_the_csv_module_or_is_not_split(line: str) -> None:
    fields = split_line(line)
    try:
        [expected] = csv.reader([line], strict=True)
    except csv.Error:
        assert fields is None
    else:
        assert fields == expected


@pytest.mark.parametrize("line", ['"', '"a', 'a,"b', '"a"b', '"a" ,b', '"""'])
def test_a_csv_line_with_wrong_quotes_is_not_split(line: str) -> None:
    assert split_line(line) is None


def test_csv_headers_and_blank_csv_lines_are_skipped() -> None:
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
        Record("a.csv", {"id": "1", "text": "one"}),
        Record("a.csv", {"id": "id", "text": "text"}),
        Record("a.csv", {"id": "2", "text": "two"}),
        Record("a.csv", {"text": "three", "picture": None, "id": "3"}),
        Record("c.csv", {"id": "4", "text": "four"}),
    ]


@pytest.mark.parametrize("line", [b"1", b"1,one,more", b'1,"one', b'"1"x,one'])
def test_malformed_csv_line_keeps_its_raw_text(line: bytes) -> None:
    [record] = records(("a.csv", 7, 0, line))
    assert record.raw == line.decode()


def test_invalid_utf_8_in_a_csv_line_changes_only_the_row_of_this_line() -> None:
    bad, good = records(("a.csv", 7, 0, b"1,caf\xe9"), ("a.csv", 7, 0, "2,caf\u00e9".encode()))
    assert (bad.fields["text"], good.fields["text"]) == ("caf\ufffd", "caf\u00e9")


# ------------------------------------------------------------------------------------------------ JSON lines


def json_lines(*lines: bytes) -> list[Record]:
    rows = [{"path": "a.jsonl", "file": "a.jsonl", "start": 0, "header": 0, "content": line} for line in lines]
    batch = pa.RecordBatch.from_pylist(rows, SCHEMA)
    return list(jsonl_records(iter([batch])))


def test_json_lines_are_parsed_and_blank_lines_are_skipped() -> None:
    lines = [b'\xef\xbb\xbf{"a": 1, "b": ["x", null]}', b" ", b'{"a": "caf\xe9"}', rb'{"a": "\ud83d\ude00 \ud800"}']
    assert [record.fields for record in json_lines(*lines)] == [
        {"a": 1, "b": ["x", None]},
        {"a": "caf\ufffd"},
        {"a": "\U0001f600 \ufffd"},
    ]


@pytest.mark.parametrize("line", [b'{"a": 1', b"[1]", b"7", b"[" * 100_000, b"{'a': 1}"])
def test_malformed_json_line_keeps_its_raw_text(line: bytes) -> None:
    bad, good = json_lines(line, b'{"a": 1}')
    assert (bad.raw, bad.fields) == (line.decode(), {})
    assert bad.problem is not None
    assert bad.problem.reason == "malformed_record"
    assert good == Record("a.jsonl", {"a": 1})


# ------------------------------------------------------------------------------------------------ tables


def test_table_rows_keep_their_types_and_an_image_struct_becomes_two_fields() -> None:
    pictures = [{"bytes": b"p", "path": "a.png"}, {"bytes": None, "path": "b.png"}, None]
    batch = pa.RecordBatch.from_pydict({FILE: ["x"] * 3, "image": pictures, "text": [["a"], None, []], "n": [1, 2, 3]})
    records = list(table_records(iter([batch]), "image"))
    assert [record.fields for record in records] == [
        {"image": b"p", "image.path": "a.png", "text": ["a"], "n": 1},
        {"image": None, "image.path": "b.png", "text": None, "n": 2},
        {"image": None, "text": [], "n": 3},
    ]


def test_invalid_utf_8_in_a_table_changes_only_its_own_row() -> None:
    binary = pa.array([b"caf\xe9", None, b"x"])
    strings = pa.Array.from_buffers(pa.string(), 3, binary.buffers())  # Spark does not validate UTF-8
    batch = pa.RecordBatch.from_arrays([pa.array(["x"] * 3), strings], names=[FILE, "text"])
    assert [record.fields["text"] for record in table_records(iter([batch]), "image")] == ["caf\ufffd", None, "x"]


def test_rows_that_spark_could_not_parse_keep_their_raw_text_and_payloads_are_parsed_again() -> None:
    rows = [{"file": "a.csv", "raw": raw, "row": [("id", "1"), ("text", None)]} for raw in ('1,"x', None)]
    schema = pa.schema([("file", pa.string()), ("raw", pa.string()), ("row", pa.map_(pa.string(), pa.string()))])
    bad, good = spark_csv_records(iter([pa.RecordBatch.from_pylist(rows, schema)]))
    assert good == Record("a.csv", {"id": "1", "text": None})
    assert (bad.raw, bad.problem and bad.problem.reason) == ('1,"x', "malformed_record")

    payloads = {"source_row": ["a#b.csv#0f", "a.csv#1e"], "payload": ['{"id": "1"}', '1,"x']}
    good, bad = payload_records(iter([pa.RecordBatch.from_pydict(payloads)]))
    assert good == Record("a#b.csv", {"id": "1"}, source_row="a#b.csv#0f")
    assert (bad.raw, bad.source_row, bad.problem is None) == ('1,"x', "a.csv#1e", False)


def test_columns_of_a_delta_table_that_nobody_named_are_read_only_for_refused_rows_and_whatever_they_hold() -> None:
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


def test_ids_of_a_delta_table_become_image_ids_as_the_ids_of_decoded_rows_do() -> None:
    values = pa.array([5.0, 4.5, None, float("nan"), float("inf")])
    [batch] = add_image_ids(iter([pa.RecordBatch.from_arrays([values], ["key"])]), source="birds")
    assert batch.to_pylist() == [{"key": 5.0, "image_id": "birds/5"}, {"key": 4.5, "image_id": "birds/4.5"}]
    texts = pa.array([" 7 ", "", "\ufeff", "x" * 10_000, "a\u0301"])
    [batch] = add_image_ids(iter([pa.RecordBatch.from_arrays([texts], ["key"])]), source="birds")
    assert batch["image_id"].to_pylist() == ["birds/7", "birds/\u00e1"]

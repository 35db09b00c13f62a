"""Tests of rows from plain text files: documents, paragraphs, lines, refused rows, and ids made from the content."""

from __future__ import annotations

import gzip
import io
import os
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import DataConfig, FileSplitConfig, HashSplitConfig
from pipelines.executor.ingest.records.record import Record
from pipelines.executor.texts.decode import OUTCOME, TextRules, decode_text, decode_texts
from pipelines.executor.texts.records import FILES, TEXT, Rows, split_text, text_records

RULES = TextRules("plays", 1000, HashSplitConfig())


def rows_of(text: str, rows: Rows, max_chars: int = 1000) -> list[Record]:
    return list(split_text(io.StringIO(text, newline=None), "play.txt", rows, max_chars))


def read(path: Path, rows: Rows = "line", max_chars: int = 1000) -> list[Record]:
    batch = pa.RecordBatch.from_pylist([{"path": os.fsencode(path), "file": path.name}], FILES)
    return list(text_records(iter([batch]), rows, max_chars))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("document", ["First:\nspeak.\n \n\nAll:\nno\n"]),
        ("paragraph", ["First:\nspeak.\n", "All:\nno\n"]),
        ("line", ["First:\n", "speak.\n", "All:\n", "no\n"]),
    ],
)
def test_a_file_is_divided_into_documents_paragraphs_or_lines_without_blank_rows(
    rows: Rows, expected: list[str]
) -> None:
    text = "\nFirst:\r\nspeak.\r\n \n\nAll:\rno\n"
    assert [record.fields[TEXT] for record in rows_of(text, rows)] == expected


@settings(max_examples=50)
@given(st.text("ab \n\r\t", max_size=40), st.sampled_from(["document", "paragraph", "line"]))
def test_no_visible_character_of_a_file_is_lost(text: str, rows: Rows) -> None:
    found = "".join(record.fields[TEXT] for record in rows_of(text, rows))
    assert "".join(found.split()) == "".join(text.split())


@settings(max_examples=100)
@given(st.text("ab \n", max_size=40), st.sampled_from(["document", "paragraph", "line"]), st.integers(1, 6))
def test_a_row_over_the_size_limit_is_refused_and_never_divided(text: str, rows: Rows, max_chars: int) -> None:
    limited, whole = rows_of(text, rows, max_chars), rows_of(text, rows)
    assert len(limited) == len(whole)
    for found, expected in zip(limited, whole, strict=True):
        assert found.problem or str(found.fields[TEXT]).strip() == str(expected.fields[TEXT]).strip()


def test_a_row_that_is_too_long_is_refused_and_the_rows_around_it_are_kept() -> None:
    records = rows_of("short\n\n" + "long " * 300 + "\nend\n\nlast", "paragraph")
    assert [record.problem and record.problem.reason for record in records] == [None, "text_too_long", None]
    assert records[1].problem
    assert records[1].problem.detail == "1505 characters, at most 1000"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_byte_order_marks_other_encodings_and_compression_change_no_text(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "play.txt"
    path.write_bytes(gzip.compress("caf\u00e9\nd\u00e9j\u00e0".encode(encoding)))
    assert [record.fields[TEXT].strip() for record in read(path)] == ["caf\u00e9", "d\u00e9j\u00e0"]


def test_a_damaged_file_keeps_its_first_rows_and_ends_with_a_refusal(tmp_path: Path) -> None:
    path = tmp_path / "play.txt.gz"
    lines = "".join(f"{os.urandom(30).hex()}\n" for _ in range(4000))
    path.write_bytes(gzip.compress(lines.encode())[:-2000])
    *good, last = read(path)
    assert [record.fields[TEXT] for record in good[:9]] == lines.splitlines(keepends=True)[:9]
    assert last.problem is not None
    assert last.problem.reason == "unreadable_file"


def test_equal_texts_in_any_file_have_equal_ids_and_splits() -> None:
    records = [Record("a.txt", {TEXT: "to be\r\n"}), Record("b.txt", {TEXT: "  to be"}), Record("a.txt", {TEXT: "no"})]
    first, second, other = (decode_text(record, RULES) for record in records)
    assert first["text"] == "to be"
    assert first["text_id"] == second["text_id"] != other["text_id"]
    assert first["split"] == second["split"]
    assert first["source_row"] != second["source_row"]


def test_every_row_has_one_outcome_and_a_refused_row_keeps_its_content() -> None:
    records = [
        Record("a.txt", {TEXT: "fine"}),
        Record("a.txt", {TEXT: "\u200b"}),
        Record("a.txt", {TEXT: "x" * 1001}),
    ]
    (batch,) = decode_texts(iter(()), lambda _: iter(records), RULES)
    assert batch.schema == OUTCOME
    found = batch.to_pylist()
    assert [row["reason"] for row in found] == [None, "empty_text", "text_too_long"]
    assert [row["payload"] is None for row in found] == [True, False, False]
    by_file = TextRules("plays", 1000, FileSplitConfig(kind="file"))
    assert decode_text(Record("val.txt", {TEXT: "fine"}), by_file)["split"] == "val"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"split": {"kind": "column"}}, "no column of splits"),
        ({"mix": {"other": 0.5}}, "mix and object_words need pictures"),
        ({"shards": {"encoding": "jpeg"}}, "plain text has no pictures"),
        ({"source": {"kind": "text", "columns": {"text": "body"}}}, "has no columns"),
    ],
)
def test_settings_of_pictures_are_refused_for_plain_text(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        DataConfig.model_validate({"source": {"kind": "text"}} | changes)
    data = DataConfig.model_validate({"source": {"kind": "text"}})
    assert DataConfig.model_validate_json(data.model_dump_json()) == data
    assert data.limits.max_text_chars > 10**6

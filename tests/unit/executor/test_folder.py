"""Tests of folder sources: named pictures are read, and a missing picture is a problem of its row only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.config import PICTURE
from pipelines.executor.ingest.records.folder import folder_records
from pipelines.executor.ingest.records.record import Problem, Record


def read_picture(folder: Path, name: object, problem: Problem | None = None) -> Record:
    """Return the record of a captions row that names a file."""

    def read(_: Iterator[pa.RecordBatch]) -> Iterator[Record]:
        yield Record("captions.csv", {"file_name": name, "text": "x"}, problem=problem)

    [record] = folder_records(iter(()), read, str(folder), "file_name", max_bytes=100)
    return record


def test_picture_is_added_to_the_fields_of_its_row(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a b.png").write_bytes(b"bytes")
    record = read_picture(tmp_path, "in/a b.png")
    assert record == Record("captions.csv", {"file_name": "in/a b.png", "text": "x", PICTURE: b"bytes"})


@pytest.mark.parametrize(
    "name", ["b.png", "", None, 7, "in", "../secret.png", "/etc/hostname", "in/../../secret.png", "a\0b", "x" * 300]
)
def test_picture_file_that_is_missing_or_outside_the_folder_is_a_problem_of_its_row(
    tmp_path: Path, name: object
) -> None:
    (tmp_path / "folder" / "in").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"secret")
    record = read_picture(tmp_path / "folder", name)
    assert record.fields[PICTURE] is None
    assert record.problem is not None
    assert record.problem.reason == "missing_field"


def test_picture_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(bytes(101))
    record = read_picture(tmp_path, "a.png")
    assert (record.fields[PICTURE], record.problem) == (None, Problem("too_large", "101 bytes, at most 100"))


def test_no_picture_file_is_read_for_a_row_that_could_not_be_parsed(tmp_path: Path) -> None:
    problem = Problem("malformed_record", "x")
    assert read_picture(tmp_path, "a.png", problem) == Record(
        "captions.csv", {"file_name": "a.png", "text": "x"}, None, problem
    )


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that exists and cannot be read")
def test_disk_error_fails_the_task_and_does_not_refuse_the_row() -> None:
    with pytest.raises(OSError, match="Input/output error"):
        read_picture(Path("/proc/self"), "mem")

"""Tests of WebDataset tars: members with the same key form a row, and a damaged tar keeps its complete rows."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.config import PICTURE
from pipelines.executor.ingest.records.record import Record
from pipelines.executor.ingest.records.webdataset import tar_records

IMAGES = ("jpg", "png")


def write_tar(path: Path, members: Mapping[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def rows_of(*paths: Path) -> list[Record]:
    batch = pa.RecordBatch.from_pydict({"path": [str(path) for path in paths]})
    return list(tar_records(iter([batch]), IMAGES, max_bytes=2_000))


ROWS = {
    "in/a.1.png": b"p",
    "in/b.jpg": b"j",
    "in/b.txt": b"caf\xc3\xa9",
    "in/b.png": b"other",
    "in/c.json": b'{"n": [1]}',
}


def test_members_with_the_same_key_form_a_row(tmp_path: Path) -> None:
    junk = {"README": b"no extension", "in/.DS_Store": b"hidden"}
    first, second, third = rows_of(write_tar(tmp_path / "x.tar", junk | ROWS))
    assert first.fields == {"__key__": "in/a", "__member__": None, PICTURE: None, "1.png": "p"}
    picture = {"__member__": "in/b.jpg", PICTURE: b"j"}
    assert second.fields == {"__key__": "in/b", **picture, "txt": "caf\u00e9", "png": b"other"}
    assert third.fields == {"__key__": "in/c", "__member__": None, PICTURE: None, "json.n": [1]}
    assert {record.file for record in (first, second, third)} == {"x.tar"}
    assert [record.problem for record in (first, second, third)] == [None] * 3


def test_tars_may_be_compressed_and_a_task_may_read_several_tars(tmp_path: Path) -> None:
    paths = write_tar(tmp_path / "x.tar.gz", ROWS, "w:gz"), write_tar(tmp_path / "y.tar", ROWS)
    assert [record.fields["__key__"] for record in rows_of(*paths)] == ["in/a", "in/b", "in/c"] * 2


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"a.png": bytes(2_001), "a.txt": b"x"}, "too_large"),
        ({"a.png": b"p", "a.PNG": b"q"}, "malformed_record"),
        ({"a.png": b"p", "a.json": b"{cut"}, "malformed_record"),
        ({"a.png": b"p", "a.json": b"[1]"}, "malformed_record"),
    ],
    ids=["large", "twice", "not-json", "no-object"],
)
def test_problem_of_a_tar_member_affects_only_the_row_of_the_member(
    tmp_path: Path, members: dict[str, bytes], reason: str
) -> None:
    bad, good = rows_of(write_tar(tmp_path / "x.tar", members | {"b.png": b"p"}))
    assert bad.problem is not None
    assert bad.problem.reason == reason
    assert good == Record("x.tar", {"__key__": "b", "__member__": "b.png", PICTURE: b"p"})


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_complete_rows_of_a_truncated_tar_are_kept_and_one_refused_row_reports_the_damage(
    tmp_path: Path, mode: str
) -> None:
    members = {f"{n}.{extension}": bytes([n]) * 700 for n in range(4) for extension in IMAGES}
    path = write_tar(tmp_path / "x.tar", members, mode)
    content, rows = path.read_bytes(), rows_of(path)
    assert len(rows) == 4
    for cut in range(1, len(content), max(1, len(content) // 40)):
        path.write_bytes(content[:cut])
        *before, last = rows_of(path)
        assert before == rows[: len(before)]
        if last.problem:
            assert last.problem.reason == "malformed_record"
            assert last.raw == f"x.tar from row {len(before) + 1} on"
        else:
            assert last.fields.items() <= rows[len(before)].fields.items()


def test_file_that_is_not_a_tar_becomes_one_refused_row(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"hello " * 200)
    [record] = rows_of(tmp_path / "x.tar")
    assert record.problem is not None
    assert record.raw == "x.tar from row 1 on"

"""Tests of folder sources: the picture of each row is read, and a missing picture is a problem of its row only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.config import PICTURE
from pipelines.executor.ingest.records.folder import (
    CAPTION_ROWS,
    NO_PICTURE,
    caption_records,
    folder_records,
    list_captions,
    subfolder_of,
)
from pipelines.executor.ingest.records.record import Problem, Record
from pipelines.executor.ingest.storage import has_entries


def read_picture(folder: Path, name: object, problem: Problem | None = None) -> Record:
    """Return the record of a row of the captions file, with the given file name."""

    def read(_: Iterator[pa.RecordBatch]) -> Iterator[Record]:
        yield Record("captions.csv", {"file_name": name, "text": "x"}, problem=problem)

    [record] = folder_records(iter(()), read, str(folder), "file_name", max_bytes=100)
    return record


def test_the_picture_that_a_row_names_is_added_to_the_fields_of_the_row(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a b.png").write_bytes(b"bytes")
    record = read_picture(tmp_path, "in/a b.png")
    assert record == Record("captions.csv", {"file_name": "in/a b.png", "text": "x", PICTURE: b"bytes"})


@pytest.mark.parametrize(
    "name", ["b.png", "", None, 7, "in", "../secret.png", "/etc/hostname", "in/../../secret.png", "a\0b", "x" * 300]
)
def test_a_row_whose_picture_file_is_missing_or_outside_the_folder_gets_a_problem(tmp_path: Path, name: object) -> None:
    (tmp_path / "folder" / "in").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"secret")
    record = read_picture(tmp_path / "folder", name)
    assert record.fields[PICTURE] is None
    assert record.problem is not None
    assert record.problem.reason == "missing_field"


def test_a_picture_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(bytes(101))
    record = read_picture(tmp_path, "a.png")
    assert (record.fields[PICTURE], record.problem) == (
        None,
        Problem("too_large", "101 bytes; at most 100 are allowed"),
    )


def test_no_picture_file_is_read_for_a_row_that_could_not_be_parsed(tmp_path: Path) -> None:
    problem = Problem("malformed_record", "x")
    assert read_picture(tmp_path, "a.png", problem) == Record(
        "captions.csv", {"file_name": "a.png", "text": "x"}, None, problem
    )


@pytest.mark.parametrize("exists", [False, True])
def test_a_missing_or_empty_folder_of_pictures_fails_the_task_because_the_drive_is_probably_not_mounted(
    tmp_path: Path, exists: bool
) -> None:
    folder = tmp_path / "drive"
    (tmp_path / "other drive").mkdir()
    if exists:
        folder.mkdir()

    def read(_: Iterator[pa.RecordBatch]) -> Iterator[Record]:
        yield Record("captions.csv", {"file_name": "a.png"})

    with pytest.raises(FileNotFoundError, match="empty or missing on this machine"):
        read_picture(folder, "a.png")
    with pytest.raises(FileNotFoundError, match="empty or missing on this machine"):
        list(list_captions(iter(()), read, str(folder / "captions.csv"), str(folder), "file_name"))


def test_the_folder_is_looked_up_once_for_any_number_of_rows_whose_pictures_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.png").touch()
    asked: list[str] = []

    def count(path: str) -> bool:
        asked.append(path)
        return has_entries(path)

    def read(_: Iterator[pa.RecordBatch]) -> Iterator[Record]:
        yield from (Record("captions.csv", {"file_name": f"{number}.png"}) for number in range(CAPTION_ROWS))

    monkeypatch.setattr("pipelines.executor.ingest.records.folder.has_entries", count)
    batches = list(list_captions(iter(()), read, str(tmp_path / "captions.csv"), str(tmp_path), "file_name"))
    records = list(folder_records(iter(batches), caption_records, str(tmp_path), "file_name", max_bytes=100))
    assert [record.problem and record.problem.reason for record in records] == ["missing_field"] * CAPTION_ROWS
    assert asked == [str(tmp_path)]


def test_a_picture_that_vanishes_with_its_folder_after_the_listing_fails_the_task(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"p")

    def read(_: Iterator[pa.RecordBatch]) -> Iterator[Record]:
        yield Record("captions.csv", {"file_name": "a.png"})

    batches = list(list_captions(iter(()), read, str(tmp_path / "captions.csv"), str(tmp_path), "file_name"))
    (tmp_path / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match="empty or missing on this machine"):
        list(folder_records(iter(batches), caption_records, str(tmp_path), "file_name", max_bytes=100))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that exists and cannot be read")
def test_a_disk_error_fails_the_task_and_does_not_refuse_the_row() -> None:
    with pytest.raises(OSError, match="Input/output error"):
        read_picture(Path("/proc/self"), "mem")


def test_pictures_are_searched_in_the_folder_and_then_beside_a_captions_file_in_a_subfolder(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.png").write_bytes(b"beside")
    (tmp_path / "b.png").write_bytes(b"folder")
    (tmp_path / "train" / "b.png").write_bytes(b"beside")

    def read(_: Iterator[pa.RecordBatch]) -> Iterator[Record]:
        for name in ("a.png", "train/a.png", "b.png", "c.png", "../b.png"):
            yield Record("metadata.csv", {"file_name": name})

    captions = str(tmp_path / "train" / "metadata.csv")
    subfolder = subfolder_of(captions, str(tmp_path))
    found = folder_records(iter(()), read, str(tmp_path), "file_name", max_bytes=100, subfolder=subfolder)
    assert [record.fields[PICTURE] for record in found] == [b"beside", b"beside", b"folder", None, b"folder"]
    listed = [
        row
        for batch in list_captions(iter(()), read, captions, str(tmp_path), "file_name")
        for row in batch.to_pylist()
    ]
    assert [row["picture"] and Path(row["picture"]).relative_to(tmp_path.resolve()).as_posix() for row in listed] == [
        "train/a.png",
        "train/a.png",
        "b.png",
        None,
        "b.png",
    ]
    assert [row["state"] == NO_PICTURE for row in listed] == [False, False, False, True, False]


def test_a_link_that_leads_out_of_the_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key.txt").write_bytes(b"secret")
    (tmp_path / "offered").mkdir()
    (tmp_path / "offered" / "text.png").symlink_to("../private/key.txt")
    record = read_picture(tmp_path / "offered", "text.png")
    assert record.fields[PICTURE] is None
    assert record.problem == Problem("missing_field", "the file 'text.png' is not inside the folder")


@pytest.mark.parametrize("captions", [5, 20])
def test_a_picture_file_is_read_only_once_for_any_number_of_rows_that_name_this_file(
    tmp_path: Path, captions: int
) -> None:
    (tmp_path / "a.png").write_bytes(b"bytes")

    def read(_: Iterator[pa.RecordBatch]) -> Iterator[Record]:
        for number in range(captions):
            yield Record("captions.csv", {"file_name": "a.png", "text": f"{number}"})

    found = folder_records(iter(()), read, str(tmp_path), "file_name", max_bytes=100)
    pictures: list[object] = []
    for record in found:
        if not pictures:  # after the first record, replace the bytes and keep size and time
            status = (tmp_path / "a.png").stat()
            (tmp_path / "a.png").write_bytes(b"other")
            os.utime(tmp_path / "a.png", ns=(status.st_atime_ns, status.st_mtime_ns))
        pictures.append(record.fields[PICTURE])
    assert pictures == [b"bytes"] * captions
    assert read_picture(tmp_path, "a.png").fields[PICTURE] == b"other"


def test_the_problem_of_an_empty_picture_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    assert read_picture(tmp_path, "a.png").problem == Problem("missing_field", "the picture file 'a.png' is empty")


def test_the_problem_of_a_missing_picture_names_a_file_whose_name_differs_only_in_case(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "UPPER.JPG").write_bytes(b"p")

    def read(_: Iterator[pa.RecordBatch]) -> Iterator[Record]:
        yield from (Record("captions.csv", {"file_name": name}) for name in ("upper.jpg", "train/upper.jpg"))

    for record in folder_records(iter(()), read, str(tmp_path), "file_name", max_bytes=100, subfolder="train"):
        assert record.problem is not None
        assert record.problem.detail.endswith("did you mean 'UPPER.JPG'?")


def test_the_picture_file_that_a_refused_row_names_is_still_listed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"p")

    def read(_: Iterator[pa.RecordBatch]) -> Iterator[Record]:
        yield Record("captions.csv", {"file_name": "a.png"}, problem=Problem("malformed_record", "x"))

    [batch] = list_captions(iter(()), read, str(tmp_path / "captions.csv"), str(tmp_path), "file_name")
    [row] = batch.to_pylist()
    assert (row["picture"], row["state"]) == (str(tmp_path / "a.png"), NO_PICTURE)


def test_a_row_whose_picture_may_not_be_read_is_read_again_after_its_permissions_were_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(b"p")

    def read(_: Iterator[pa.RecordBatch]) -> Iterator[Record]:
        yield Record("captions.csv", {"file_name": "a.png"})

    def state() -> str:
        [batch] = list_captions(iter(()), read, str(tmp_path / "captions.csv"), str(tmp_path), "file_name")
        return str(batch.to_pylist()[0]["state"])

    with monkeypatch.context() as patch:  # root may read every file, whatever its permissions are
        patch.setattr("os.access", lambda path, mode: False)
        assert state() == NO_PICTURE
    assert state() != NO_PICTURE


@pytest.mark.parametrize("name", [7, 7.0, "7"])
def test_a_row_may_name_a_picture_file_by_a_number(tmp_path: Path, name: object) -> None:
    (tmp_path / "7").write_bytes(b"p")
    assert read_picture(tmp_path, name).fields[PICTURE] == b"p"


@pytest.mark.parametrize("name", [["a.png"], {"path": "a.png"}, 7.5])
def test_a_value_that_is_neither_text_nor_integer_names_no_file(tmp_path: Path, name: object) -> None:
    (tmp_path / "other.png").touch()  # an empty folder would mean that its drive is not mounted
    detail = f"a value of type {type(name).__name__} instead of the name of a file"
    assert read_picture(tmp_path, name).problem == Problem("malformed_record", detail)

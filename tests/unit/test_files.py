"""Pictures that are files of their own: read where they are there, told where not, and never outside their folder."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.config import PICTURE
from pipelines.executor.ingest.files import tar_records, with_pictures
from pipelines.executor.ingest.records import Record, Trouble

IMAGES = ("jpg", "png")


def picture_of(folder: Path, name: object, trouble: Trouble | None = None) -> Record:
    """The record of a captions file's row that names a file."""

    def read(_: Iterator[pa.RecordBatch]) -> Iterator[Record]:
        yield Record("captions.csv", {"file_name": name, "text": "x"}, trouble=trouble)

    [record] = with_pictures(iter(()), read, str(folder), "file_name", max_bytes=100)
    return record


def test_a_picture_is_read_from_its_folder_and_the_row_stays_whole(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a b.png").write_bytes(b"bytes")
    record = picture_of(tmp_path, "in/a b.png")
    assert record == Record("captions.csv", {"file_name": "in/a b.png", "text": "x", PICTURE: b"bytes"})


@pytest.mark.parametrize(
    "name", ["b.png", "", None, 7, "in", "../secret.png", "/etc/hostname", "in/../../secret.png", "a\0b", "x" * 300]
)
def test_a_file_that_is_not_there_or_not_in_the_folder_is_the_rows_own_trouble(tmp_path: Path, name: object) -> None:
    (tmp_path / "folder" / "in").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"secret")
    record = picture_of(tmp_path / "folder", name)
    assert record.fields[PICTURE] is None
    assert record.trouble is not None
    assert record.trouble.reason == "missing_field"


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(bytes(101))
    record = picture_of(tmp_path, "a.png")
    assert (record.fields[PICTURE], record.trouble) == (None, Trouble("too_large", "101 bytes, at most 100"))


def test_a_row_that_could_not_be_read_names_no_file(tmp_path: Path) -> None:
    trouble = Trouble("malformed_record", "x")
    assert picture_of(tmp_path, "a.png", trouble) == Record(
        "captions.csv", {"file_name": "a.png", "text": "x"}, None, trouble
    )


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that is there and cannot be read")
def test_a_disk_that_fails_fails_the_task_and_fills_no_quarantine() -> None:
    with pytest.raises(OSError, match="Input/output error"):
        picture_of(Path("/proc/self"), "mem")


# ------------------------------------------------------------------------------------------------ tars


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


def test_members_of_one_name_are_a_row(tmp_path: Path) -> None:
    junk = {"README": b"no extension", "in/.DS_Store": b"hidden"}
    first, second, third = rows_of(write_tar(tmp_path / "x.tar", junk | ROWS))
    assert first.fields == {"__key__": "in/a", "__member__": None, PICTURE: None, "1.png": "p"}
    picture = {"__member__": "in/b.jpg", PICTURE: b"j"}
    assert second.fields == {"__key__": "in/b", **picture, "txt": "caf\u00e9", "png": b"other"}
    assert third.fields == {"__key__": "in/c", "__member__": None, PICTURE: None, "json.n": [1]}
    assert {record.file for record in (first, second, third)} == {"x.tar"}
    assert [record.trouble for record in (first, second, third)] == [None] * 3


def test_tars_may_be_compressed_and_come_several_to_a_task(tmp_path: Path) -> None:
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
def test_a_members_trouble_is_its_rows_alone(tmp_path: Path, members: dict[str, bytes], reason: str) -> None:
    bad, good = rows_of(write_tar(tmp_path / "x.tar", members | {"b.png": b"p"}))
    assert bad.trouble is not None
    assert bad.trouble.reason == reason
    assert good == Record("x.tar", {"__key__": "b", "__member__": "b.png", PICTURE: b"p"})


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_wherever_a_tar_breaks_off_the_rows_before_are_kept_and_the_rest_is_told(tmp_path: Path, mode: str) -> None:
    members = {f"{n}.{extension}": bytes([n]) * 700 for n in range(4) for extension in IMAGES}
    whole = write_tar(tmp_path / "x.tar", members, mode)
    content, rows = whole.read_bytes(), rows_of(whole)
    assert len(rows) == 4
    for cut in range(1, len(content), max(1, len(content) // 40)):
        whole.write_bytes(content[:cut])
        *before, last = rows_of(whole)
        assert before == rows[: len(before)]
        if last.trouble:
            assert last.trouble.reason == "malformed_record"
            assert last.raw == f"x.tar from row {len(before) + 1} on"
        else:
            assert last.fields.items() <= rows[len(before)].fields.items()


def test_a_file_that_is_no_tar_is_one_refused_row(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"hello " * 200)
    [record] = rows_of(tmp_path / "x.tar")
    assert record.trouble is not None
    assert record.raw == "x.tar from row 1 on"

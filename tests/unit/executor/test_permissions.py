"""Tests of files that the driver may read and an executor may not: the task fails, and no file counts as damaged.

A changed permission changes neither the size nor the time of a file. If an ingest refused such a file, no later ingest
would read the file. A file that the driver may not read either is refused, and read again when it becomes readable.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from parquet_ranges import RANGES
from without_permission import without_permission

from pipelines.config import PICTURE
from pipelines.executor.ingest.records.folder import NO_PICTURE, caption_records, folder_records, list_captions
from pipelines.executor.ingest.records.jsonl import jsonl_records
from pipelines.executor.ingest.records.lines import RANGE, WHOLE, Layout
from pipelines.executor.ingest.records.parquet import parquet_records
from pipelines.executor.ingest.records.pictures.root import PictureRoot
from pipelines.executor.ingest.records.record import Problem, Read, Record, refuse_denied
from pipelines.executor.ingest.records.webdataset import tar_records
from pipelines.executor.texts.records import FILES, text_records


def line_rows(paths: list[Path]) -> pa.RecordBatch:
    rows = [(os.fsencode(path), path.name, 0, WHOLE, 0, "{}") for path in paths]
    return pa.RecordBatch.from_pylist([dict(zip(RANGE.names, row, strict=True)) for row in rows], RANGE)


def file_rows(paths: list[Path]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([{"path": os.fsencode(path), "file": path.name} for path in paths], FILES)


def parquet_rows(paths: list[Path]) -> pa.RecordBatch:
    rows: list[dict[str, Any]] = [
        {"path": str(path), "file": path.name, "start": start, "end": start + 2, "partition": []}
        for path in paths
        for start in (0, 2, 4)
    ]
    return pa.RecordBatch.from_pylist(rows, RANGES)


KINDS: dict[str, tuple[Callable[[list[Path]], pa.RecordBatch], Read]] = {
    "jsonl": (line_rows, partial(jsonl_records, layouts=[Layout()], limit=10**6)),
    "text": (file_rows, partial(text_records, rows="line", max_chars=100)),
    "tar": (file_rows, partial(tar_records, images=("jpg",), named=(), max_bytes=100)),
    "parquet": (parquet_rows, partial(parquet_records, image="image", named=("image",), max_bytes=100)),
}
"""For each kind of file, the function that makes raw rows, and the parser of the rows."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_only_this_machine_may_not_read_fails_the_task_and_is_not_refused(
    kind: str, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"content")
    rows, read = KINDS[kind]
    batch = rows([tmp_path / "a"])
    assert list(read(iter([batch])))
    with without_permission(tmp_path / "a"), pytest.raises(PermissionError):
        list(read(iter([batch])))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_the_driver_may_not_read_is_refused_once_and_all_other_files_are_read(
    kind: str, tmp_path: Path
) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(b"content")
    rows, read = KINDS[kind]
    expected = [record for path in (paths[0], paths[2]) for record in read(iter([rows([path])]))]
    denied = {os.fsencode(paths[1])}
    records = list(refuse_denied(iter([rows(paths)]), read=read, denied=denied))
    [refused] = [record for record in records if record.file == "b"]
    assert refused.problem == Problem("unreadable_file", "Permission denied")
    assert refused.raw == f"{paths[1]}: Permission denied"
    assert [record for record in records if record.file != "b"] == expected


def listed(folder: Path) -> list[pa.RecordBatch]:
    def read(_: Iterator[pa.RecordBatch]) -> Iterator[Record]:
        yield Record("captions.csv", {"file_name": "a.png"})

    return list(list_captions(iter(()), read, str(folder / "captions.csv"), str(folder), "file_name"))


def test_a_picture_that_could_be_read_when_the_rows_were_listed_fails_the_task_if_it_may_not_be_read_any_more(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.png").write_bytes(b"picture")
    batches = listed(tmp_path)
    assert batches[0]["state"].to_pylist() != [NO_PICTURE]
    read = partial(folder_records, read=caption_records, folder=str(tmp_path), column="file_name", max_bytes=100)
    [record] = read(iter(batches))
    assert record.fields[PICTURE] == b"picture"
    with without_permission(tmp_path / "a.png"), pytest.raises(PermissionError):
        list(read(iter(batches)))


def test_a_picture_that_could_not_be_read_when_the_rows_were_listed_is_refused_without_a_change_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(b"picture")
    with monkeypatch.context() as patch:  # root may read every file, whatever its permissions are
        patch.setattr("os.access", lambda path, mode: False)
        batches = listed(tmp_path)
    assert batches[0]["state"].to_pylist() == [NO_PICTURE]
    [record] = folder_records(iter(batches), caption_records, str(tmp_path), "file_name", max_bytes=100)
    problem = Problem("unreadable_file", "the file 'a.png' cannot be read: Permission denied")
    assert (record.fields, record.problem) == ({"file_name": "a.png", PICTURE: None}, problem)


def test_a_picture_of_an_image_root_that_may_not_be_read_is_a_problem_of_its_row(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"picture")
    root = PictureRoot(str(tmp_path), max_bytes=100)
    assert root.read("a.png") == b"picture"
    with without_permission(tmp_path / "a.png"):
        found = root.read("a.png")
    assert found == Problem("unreadable_file", "the file 'a.png' cannot be read: Permission denied")

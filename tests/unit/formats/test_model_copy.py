"""Tests that a changed file of a copied model is found, even if its size and modification time are unchanged."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from pipelines.formats.model_copy import RECORD, check_copy, record_copy


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A recorded copy of a model with one file."""
    (tmp_path / "model.safetensors").write_bytes(b"weights 1")
    record_copy(tmp_path)
    return tmp_path


def set_content(path: Path, content: bytes) -> None:
    """Change a file, but keep its modification time, as `rsync --times` and `cp -p` do."""
    before = path.stat()
    time.sleep(0.05)  # the kernel's times of change have a resolution of some milliseconds
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_file_that_changed_in_place_is_found_even_if_its_size_and_modification_time_are_unchanged(copy: Path) -> None:
    set_content(copy / "model.safetensors", b"weights 2")
    assert check_copy(copy) is None


def test_a_copy_whose_files_were_written_again_with_the_same_content_stays_valid(copy: Path) -> None:
    digest = record_copy(copy).digest
    set_content(copy / "model.safetensors", b"weights 1")
    for _ in range(2):  # the first call writes a new record, and the second call reads this record
        found = check_copy(copy)
        assert found is not None
        assert found.digest == digest


@pytest.mark.parametrize("content", [b"weights 1", b"weights 2"])
def test_the_content_is_compared_if_an_earlier_version_of_lakesight_recorded_the_copy(
    copy: Path, content: bytes
) -> None:
    record = json.loads((copy / RECORD).read_text())
    for file in record["files"].values():
        del file["changed_ns"]
    (copy / RECORD).write_text(json.dumps(record))
    set_content(copy / "model.safetensors", content)
    assert (check_copy(copy) is None) == (content == b"weights 2")

"""Tests of atomic writes: a file is complete or unchanged if a write fails or several processes write the same file."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from vlm.files import atomic_write


def test_a_failed_write_leaves_the_old_file_in_place_and_no_temporary_file_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("new")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert (path.read_text(), [each.name for each in tmp_path.iterdir()]) == ("old", ["a.json"])


def test_a_file_may_have_the_longest_name_that_the_system_allows(tmp_path: Path) -> None:
    path = tmp_path / "folder" / ("a" * 255)
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_concurrent_writers_of_one_file_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    path, in_block = tmp_path / "a.txt", threading.Barrier(8, timeout=30)

    def write(number: int) -> None:
        with atomic_write(path) as temporary:
            temporary.write_text(str(number) * 1000)
            in_block.wait()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = path.read_text()
    assert content == content[0] * 1000
    assert len(list(tmp_path.iterdir())) == 1

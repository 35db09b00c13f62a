"""Tests of files: a failed or concurrent write leaves a whole file, and damaged files of a model are refused."""

from __future__ import annotations

import os
import re
import shutil
import threading
from pathlib import Path

import pytest
from tiny_models import tiny_model

import vlm
from vlm.checkpoint import MODEL_FILES, load_model, save_model
from vlm.errors import CheckpointError
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a tiny model."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_model(folder, *tiny_model("plain"))
    return folder


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["deep", "pipe", "device", "folder", "not UTF-8"])
@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_model_file_that_is_no_ordinary_file_or_is_nested_too_deeply_is_refused(
    checkpoint: Path, tmp_path: Path, name: str, kind: str
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    path = folder / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"[" * 100_000 if kind == "deep" else b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load_model(folder)
    with pytest.raises(CheckpointError, match=re.escape(str(folder))):
        vlm.load(folder)

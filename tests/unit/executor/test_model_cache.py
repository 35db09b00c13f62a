"""Tests of local copies of a model's files: the first process makes a complete copy, and unused copies are removed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from disk_faults import can_mount, run_on_small_disk
from processes import TEST_PATH

from pipelines.errors import StageFailed
from pipelines.executor.model_cache import KEPT, local_copy
from pipelines.formats.model_copy import model_files, record_copy

COPY = """
import shutil, sys, time
from pathlib import Path
from pipelines.executor.model_cache import local_copy
whole = shutil.copyfile
def slowly(source, target):
    print("copies", source.name, flush=True)
    time.sleep(float(sys.argv[3]))
    return whole(source, target)
shutil.copyfile = slowly
print("asks", flush=True)
print(local_copy(Path(sys.argv[1]), root=Path(sys.argv[2])), flush=True)
"""

FILL = """
import sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from pipelines.executor.model_cache import converted_copy, local_copy
root, *folders = map(Path, sys.argv[1:])
def convert(source, target):
    (source / "model.safetensors").read_bytes()
    save_file({"weights": np.zeros(300 << 10, np.int8)}, target / "model.safetensors")
copies = [local_copy(folder, root=root) for folder in folders]
copies.append(converted_copy(copies[-1], "", ["int8"], convert, root))
print([copy.exists() for copy in copies])
local_copy(folders[0].with_name("large"), root=root)
"""
"""Program that copies models of 300 KiB and converts the last copy, and then copies the model `large`."""


def model(folder: Path, said: str = "weights") -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_text(said)
    (folder / "config.json").write_text("{}")
    return folder


def start(folder: Path, root: Path, seconds: float) -> subprocess.Popen[str]:
    """Start a process that copies files and takes at least `seconds` for each file."""
    environment = os.environ | {"PYTHONPATH": TEST_PATH}
    command = [sys.executable, "-c", COPY, str(folder), str(root), str(seconds)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def line(process: subprocess.Popen[str]) -> str:
    """Return the next line that the process prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_model_is_copied_to_the_cache_once_and_again_only_after_it_was_replaced(tmp_path: Path) -> None:
    folder, root = model(tmp_path / "far"), tmp_path / "near"
    copy = local_copy(folder, root=root)
    assert {path.name: path.read_text() for path in model_files(copy)} == {
        "model.safetensors": "weights",
        "config.json": "{}",
    }
    inode = copy.stat().st_ino
    assert local_copy(folder, root=root) == copy
    assert copy.stat().st_ino == inode, "the model was copied a second time"
    (folder / "model.safetensors").write_text("others")
    assert (local_copy(folder, root=root) / "model.safetensors").read_text() == "others"


def test_a_damaged_copy_is_copied_again_and_a_model_with_another_digest_is_refused(tmp_path: Path) -> None:
    folder, root = model(tmp_path / "far"), tmp_path / "near"
    digest = record_copy(folder).digest
    copy = local_copy(folder, digest, root)
    for damage in ("weight", "weighty"):  # a shorter file, then a file of equal size with a later time
        (copy / "model.safetensors").write_text(damage)
        assert (local_copy(folder, digest, root) / "model.safetensors").read_text() == "weights"
    with pytest.raises(StageFailed, match="cannot be copied to this host"):
        local_copy(folder, "0" * 64, root)
    assert [path.name for path in root.iterdir() if path.is_dir() and not path.suffix] == [copy.name]


def test_only_the_most_recently_used_models_are_kept(tmp_path: Path) -> None:
    folders = [model(tmp_path / f"far-{number}") for number in range(KEPT + 2)]
    copies = []
    for number, folder in enumerate(folders):
        copies.append(local_copy(folder, root=tmp_path / "near"))
        os.utime(copies[-1], (number, number))
    assert local_copy(folders[-KEPT], root=tmp_path / "near") == copies[-KEPT]
    assert [copy.exists() for copy in copies] == [False, False] + [True] * KEPT


@pytest.mark.skipif(not can_mount(), reason="this user may not mount a file system in a namespace")
def test_the_least_recently_used_copies_are_removed_while_the_disk_is_too_full_for_a_new_copy(tmp_path: Path) -> None:
    folders = [model(tmp_path / f"far-{number}", "w" * (300 << 10)) for number in range(3)]
    model(tmp_path / "large", "w" * (900 << 10))
    (root := tmp_path / "near").mkdir()
    command = [sys.executable, "-c", FILL, str(root), *map(str, folders)]
    done = run_on_small_disk(command, root, 700, os.environ | {"PYTHONPATH": TEST_PATH})
    assert done.stdout.strip() == "[False, False, True, True]", done.stderr
    assert "No space left on device" in done.stderr.splitlines()[-1], "a model that is larger than the disk is an error"
    assert [path.name for path in root.iterdir()] == ["lock"]


def test_two_processes_make_one_copy_of_a_model_and_a_killed_process_leaves_no_partial_copy(tmp_path: Path) -> None:
    folder, root = model(tmp_path / "far"), tmp_path / "near"
    victim = start(folder, root, 60)
    assert [line(victim), line(victim)] == ["asks", "copies config.json"]
    assert [path.suffix for path in root.iterdir() if path.is_dir()] == [".part"]
    others = [start(folder, root, 0) for _ in range(2)]
    assert [line(other) for other in others] == ["asks", "asks"]
    time.sleep(0.3)
    assert all(other.poll() is None for other in others), "the other processes wait for the process that copies"
    victim.send_signal(signal.SIGKILL)
    said = [other.communicate(timeout=60)[0].splitlines() for other in others]
    victim.wait()
    assert sorted(len(lines) for lines in said) == [1, 3], "one process copied both files, the other none"
    assert said[0][-1] == said[1][-1]
    [copy] = [path for path in root.iterdir() if path.is_dir()]
    assert str(copy) == said[0][-1]
    assert (copy / "model.safetensors").read_text() == "weights"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_cache_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "near").mkdir()
    os.chown(tmp_path / "near", 12345, 12345)
    with pytest.raises(StageFailed, match="another user"):
        local_copy(model(tmp_path / "far"), root=tmp_path / "near")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a link away")
def test_a_link_that_another_user_has_put_in_place_of_the_cache_folder_is_refused(tmp_path: Path) -> None:
    """The cache removes old subfolders of its folder. With a link, another user could make the cache remove subfolders
    of any other folder.
    """
    (tmp_path / "valuable" / "work").mkdir(parents=True)
    (tmp_path / "near").symlink_to(tmp_path / "valuable")
    os.lchown(tmp_path / "near", 12345, 12345)
    with pytest.raises(StageFailed, match="another user"):
        local_copy(model(tmp_path / "far"), root=tmp_path / "near")
    assert (tmp_path / "valuable" / "work").exists()


def test_a_cache_folder_in_which_every_user_may_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "near").mkdir()
    (tmp_path / "near").chmod(0o777)
    with pytest.raises(StageFailed, match="every user may write"):
        local_copy(model(tmp_path / "far"), root=tmp_path / "near")

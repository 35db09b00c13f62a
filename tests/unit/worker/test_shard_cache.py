"""Tests of the shard cache: files are copied once, up to the limit, and the copies never change the rows."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from processes import TEST_PATH
from tiny_runs import write_shards

from pipelines.errors import StageFailed
from pipelines.formats.shards import Shards
from pipelines.worker.data.shard_cache import ShardCopier

FILES, PLENTY = 4, 2**40

COPY = """
import re, shutil, sys, time
from pathlib import Path
from types import SimpleNamespace
from pipelines.formats.shards import Shards
from pipelines.worker.data.shard_cache import ShardCopier
folder, root, record, seconds = sys.argv[1:]
original = shutil.copyfile
def copy_slowly(source, target):
    target.write_bytes(source.read_bytes()[:1000])
    with open(record, "a") as file:
        file.write(f"{source.name} ")
    time.sleep(float(seconds))
    return original(source, target)
shutil.copyfile = copy_slowly
shutil.disk_usage = lambda _: SimpleNamespace(total=2**40, free=2**40)
copier = ShardCopier([Shards.open(Path(folder))], 2**40, Path(root))
print("ready", flush=True)
copier.start()
copier.join()
copier.check()
print(*sorted(re.findall(r"(\\d+) +/.*[.]arrow", Path("/proc/self/maps").read_text())))
"""
"""Script that copies slowly, records what it copies, and prints the inodes of the files that it has mapped.

The script pretends that the disk is large, because no file is copied to a disk that is nearly full.
"""


class Disk(NamedTuple):
    """Stand-in for the result of shutil.disk_usage."""

    total: int
    used: int
    free: int


@pytest.fixture(autouse=True)
def large_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that the disk is large, so that only the limit of the cache matters."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(PLENTY, 0, PLENTY))


@pytest.fixture
def source(tmp_path: Path) -> Shards:
    return write_shards(tmp_path / "source", rows=FILES * 8)


def finished_copier(shards: Shards, root: Path, limit: float = PLENTY) -> ShardCopier:
    """Return a shard copier whose thread has ended."""
    made = ShardCopier([shards], limit, root)
    made.start()
    made.join()
    return made


def contents(shards: Shards) -> list[tuple[bytes, Any]]:
    rows = [shards.row(index) for index in range(len(shards))]
    return [(row.pixels.tobytes(), (row.image_id, row.texts)) for row in rows]


def copies(root: Path) -> list[str]:
    """Return the SHA-256 of each copied file."""
    return sorted(path.stem for path in root.iterdir() if path.name != "lock")


def digests(shards: Shards) -> list[str]:
    return sorted(file.sha256 for file in shards.manifest.files)


def largest_file(shards: Shards) -> int:
    return max(file.bytes for file in shards.manifest.files)


def test_rows_that_are_read_from_copies_of_shard_files_are_unchanged(source: Shards, tmp_path: Path) -> None:
    before, shards = contents(source), Shards.open(source.folder)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "of-a-killed-process.part").touch()
    finished_copier(shards, tmp_path / "cache").check()
    for file in shards.manifest.files:
        (source.folder / file.file).unlink()
    assert contents(shards) == before
    assert copies(tmp_path / "cache") == digests(source)


def test_rows_are_read_from_the_original_files_until_their_copies_are_complete(source: Shards, tmp_path: Path) -> None:
    before, shards = contents(source), Shards.open(source.folder)
    copier = ShardCopier([shards], PLENTY, tmp_path / "cache")
    assert contents(shards) == before
    copier.start()
    assert contents(shards) == before, "while files are being copied"
    copier.join()
    assert contents(shards) == before


def test_existing_copies_of_shard_files_are_reused_and_truncated_copies_are_replaced(
    source: Shards, tmp_path: Path
) -> None:
    root = tmp_path / "cache"
    finished_copier(Shards.open(source.folder), root)
    kept, truncated, *_ = (root / f"{digest}.arrow" for digest in digests(source))
    inode = kept.stat().st_ino
    truncated.write_bytes(b"cut")
    shards = Shards.open(source.folder)
    finished_copier(shards, root).check()
    assert kept.stat().st_ino == inode
    assert contents(shards) == contents(source)


def test_cached_copies_stay_below_the_size_limit_and_rows_without_a_copy_are_read_from_original_files(
    source: Shards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards, root = Shards.open(source.folder), tmp_path / "cache"
    limit = 2.5 * largest_file(source)
    for _ in range(2):
        caplog.clear()
        finished_copier(shards, root, limit).check()
        assert len(copies(root)) == 2
        assert contents(shards) == contents(source)
        [warning] = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert warning.getMessage() == f"only 2 of 4 shard files fit into the cache folder {root}"


def test_the_least_recently_used_copy_is_deleted_first_and_a_process_that_maps_it_can_still_read_it(
    source: Shards, tmp_path: Path
) -> None:
    root = tmp_path / "cache"
    again, new = (write_shards(tmp_path / str(seed), rows=8, seed=seed) for seed in (1, 2))
    before, mapped = contents(source), Shards.open(source.folder)
    finished_copier(mapped, root)
    finished_copier(again, root)
    files = [root / f"{file.sha256}.arrow" for file in (*again.manifest.files, *source.manifest.files)]
    for age, path in zip((9, 3, 1, 2, 0), files, strict=True):
        os.utime(path, (10**9 - age, 10**9 - age))
    finished_copier(again, root)
    finished_copier(new, root, 5.5 * largest_file(source)).check()
    assert [path.exists() for path in files] == [True, False, True, True, True]
    finished_copier(new, root, 1.5 * largest_file(source)).check()
    assert [path.exists() for path in files] == [True, False, True, True, True], "nothing had to be copied"
    assert contents(mapped) == before
    assert contents(new) == contents(Shards.open(new.folder))


def test_shard_files_are_not_copied_to_a_nearly_full_disk(
    source: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    total = 100 * largest_file(source)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(total, 0, total // 10 + largest_file(source) // 2))
    finished_copier(source, tmp_path / "cache").check()
    assert copies(tmp_path / "cache") == []
    assert any("only 0 of 4 shard files fit" in message for message in caplog.messages)


def test_training_continues_with_one_warning_if_the_disk_of_the_shard_cache_is_full(
    source: Shards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file(source) // 2, limits[1]))
    try:
        made = finished_copier(source, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    made.check()
    assert copies(tmp_path / "cache") == []
    assert len(contents(source)) == FILES * 8
    [warning] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "copying shards to this host stopped" in warning.getMessage()
    assert "the remaining rows are read from the original files: [Errno" in warning.getMessage()


def test_a_shard_file_that_differs_from_the_manifest_fails_the_training(source: Shards, tmp_path: Path) -> None:
    path = source.folder / source.manifest.files[1].file
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)
    with pytest.raises(StageFailed, match=r"a training shard is damaged.*shard-000001.arrow.*SHA-256"):
        finished_copier(Shards.open(source.folder), tmp_path / "cache").check()
    assert copies(tmp_path / "cache") == [source.manifest.files[0].sha256]


def start(source: Shards, root: Path, seconds: float) -> subprocess.Popen[str]:
    """Start a process that takes at least `seconds` to copy one file.

    This function returns when the process is about to copy the first file.
    """
    command = [sys.executable, "-c", COPY, str(source.folder), str(root), str(root.with_name("record")), str(seconds)]
    environment = os.environ | {"PYTHONPATH": TEST_PATH}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to list the files a process has mapped")
def test_two_processes_copy_each_file_once_and_a_killed_process_leaves_no_lock_or_partial_file(
    source: Shards, tmp_path: Path
) -> None:
    root, record = tmp_path / "cache", tmp_path / "record"
    names = [file.file for file in source.manifest.files]
    victim = start(source, root, 60)
    while not record.exists() or not record.read_text():
        assert victim.poll() is None
        time.sleep(0.01)
    assert [path.suffix for path in root.iterdir() if path.name != "lock"] == [".part"]
    others = [start(source, root, 0.05) for _ in range(2)]
    time.sleep(0.3)
    assert record.read_text().split() == names[:1], "the others wait for the lock"
    victim.send_signal(signal.SIGKILL)
    mapped = [other.communicate(timeout=60)[0].split() for other in others]
    victim.communicate()
    assert record.read_text().split() == [names[0], *names], "each file is copied by one process"
    assert mapped[0] == mapped[1], "both processes have mapped the same copies"
    assert len(mapped[0]) == FILES
    assert copies(root) == digests(source)
    assert all(path.suffix == ".arrow" or path.name == "lock" for path in root.iterdir())

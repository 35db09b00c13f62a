"""Shards on this machine: copied once, as many as there is room for, and the same rows whatever becomes of copies."""

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
from pipelines.formats.shards import Shards
from pipelines.worker.data.shard_cache import ShardCopier
far, root, record, seconds = sys.argv[1:]
whole = shutil.copyfile
def slowly(source, target):
    target.write_bytes(source.read_bytes()[:1000])
    with open(record, "a") as file:
        file.write(f"{source.name} ")
    time.sleep(float(seconds))
    return whole(source, target)
shutil.copyfile = slowly
copier = ShardCopier([Shards.open(Path(far))], 2**40, Path(root))
print("asks", flush=True)
copier.start()
copier.join()
copier.check()
print(*sorted(re.findall(r"(\\d+) +/.*[.]arrow", Path("/proc/self/maps").read_text())))
"""
"""Copies slowly, keeps a record of what it copies, and prints the numbers of the files that it has mapped."""


class Disk(NamedTuple):
    """What shutil.disk_usage says."""

    total: int
    used: int
    free: int


@pytest.fixture(autouse=True)
def roomy_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit alone decides, whatever disk the tests run on."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(PLENTY, 0, PLENTY))


@pytest.fixture
def far(tmp_path: Path) -> Shards:
    return write_shards(tmp_path / "far", rows=FILES * 8)


def copier(shards: Shards, root: Path, limit: float = PLENTY) -> ShardCopier:
    """One that is done."""
    made = ShardCopier([shards], limit, root)
    made.start()
    made.join()
    return made


def contents(shards: Shards) -> list[tuple[bytes, Any]]:
    rows = [shards.row(index) for index in range(len(shards))]
    return [(row.pixels.tobytes(), (row.image_id, row.texts)) for row in rows]


def copies(root: Path) -> list[str]:
    """Digests of the files that are here."""
    return sorted(path.stem for path in root.iterdir() if path.name != "lock")


def digests(shards: Shards) -> list[str]:
    return sorted(file.sha256 for file in shards.manifest.files)


def size_of(shards: Shards) -> int:
    return max(file.bytes for file in shards.manifest.files)


def test_rows_come_from_the_copies_and_are_the_same(far: Shards, tmp_path: Path) -> None:
    before, shards = contents(far), Shards.open(far.folder)
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "of-a-killed-one.part").touch()
    copier(shards, tmp_path / "near").check()
    for file in shards.manifest.files:
        (far.folder / file.file).unlink()
    assert contents(shards) == before
    assert copies(tmp_path / "near") == digests(far)


def test_rows_are_read_from_where_they_lie_until_their_file_is_here(far: Shards, tmp_path: Path) -> None:
    before, shards = contents(far), Shards.open(far.folder)
    waiting = ShardCopier([shards], PLENTY, tmp_path / "near")
    assert contents(shards) == before
    waiting.start()
    assert contents(shards) == before, "in the middle of it"
    waiting.join()
    assert contents(shards) == before


def test_what_was_copied_before_is_found_and_a_cut_copy_is_made_again(far: Shards, tmp_path: Path) -> None:
    root = tmp_path / "near"
    copier(Shards.open(far.folder), root)
    kept, cut, *_ = (root / f"{digest}.arrow" for digest in digests(far))
    inode = kept.stat().st_ino
    cut.write_bytes(b"cut")
    shards = Shards.open(far.folder)
    copier(shards, root).check()
    assert kept.stat().st_ino == inode
    assert contents(shards) == contents(far)


def test_no_more_is_copied_than_the_limit_and_the_rest_is_read_from_where_it_lies(
    far: Shards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards, root = Shards.open(far.folder), tmp_path / "near"
    limit = 2.5 * size_of(far)
    for _ in range(2):
        caplog.clear()
        copier(shards, root, limit).check()
        assert len(copies(root)) == 2
        assert contents(shards) == contents(far)
        [said] = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert said.message == f"there is room for 2 of 4 shard files in {root}"


def test_files_of_other_runs_make_room_those_used_longest_ago_first_and_who_maps_them_reads_on(
    far: Shards, tmp_path: Path
) -> None:
    root = tmp_path / "near"
    again, new = (write_shards(tmp_path / str(seed), rows=8, seed=seed) for seed in (1, 2))
    before, mapped = contents(far), Shards.open(far.folder)
    copier(mapped, root)
    copier(again, root)
    files = [root / f"{file.sha256}.arrow" for file in (*again.manifest.files, *far.manifest.files)]
    for age, path in zip((9, 3, 1, 2, 0), files, strict=True):
        os.utime(path, (10**9 - age, 10**9 - age))
    copier(again, root)
    copier(new, root, 5.5 * size_of(far)).check()
    assert [path.exists() for path in files] == [True, False, True, True, True]
    copier(new, root, 1.5 * size_of(far)).check()
    assert [path.exists() for path in files] == [True, False, True, True, True], "nothing had to be copied"
    assert contents(mapped) == before
    assert contents(new) == contents(Shards.open(new.folder))


def test_a_disk_that_is_nearly_full_is_left_to_others(
    far: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    total = 100 * size_of(far)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(total, 0, total // 10 + size_of(far) // 2))
    copier(far, tmp_path / "near").check()
    assert copies(tmp_path / "near") == []
    assert "there is room for 0 of 4 shard files" in caplog.text


def test_a_full_disk_is_said_once_and_the_training_goes_on(
    far: Shards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_of(far) // 2, limits[1]))
    try:
        made = copier(far, tmp_path / "near")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    made.check()
    assert copies(tmp_path / "near") == []
    assert len(contents(far)) == FILES * 8
    [said] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "no more shards are copied to this machine, the rest is read from where it lies: [Errno" in said.message


def test_a_shard_that_is_not_what_its_manifest_says_ends_the_training(far: Shards, tmp_path: Path) -> None:
    path = far.folder / far.manifest.files[1].file
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)
    with pytest.raises(StageFailed, match=r"a training shard is damaged.*shard-000001.arrow.*SHA-256"):
        copier(Shards.open(far.folder), tmp_path / "near").check()
    assert copies(tmp_path / "near") == [far.manifest.files[0].sha256]


def start(far: Shards, root: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that copies, each file no faster than this; it has come as far as to ask for them."""
    command = [sys.executable, "-c", COPY, str(far.folder), str(root), str(root.with_name("record")), str(seconds)]
    environment = os.environ | {"PYTHONPATH": TEST_PATH}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "asks\n"
    return process


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux which files a process has mapped")
def test_two_processes_copy_each_file_once_and_a_killed_one_leaves_nothing_behind(far: Shards, tmp_path: Path) -> None:
    root, record = tmp_path / "near", tmp_path / "record"
    names = [file.file for file in far.manifest.files]
    victim = start(far, root, 60)
    while not record.exists() or not record.read_text():
        assert victim.poll() is None
        time.sleep(0.01)
    assert [path.suffix for path in root.iterdir() if path.name != "lock"] == [".part"]
    others = [start(far, root, 0.05) for _ in range(2)]
    time.sleep(0.3)
    assert record.read_text().split() == names[:1], "they wait for the one that copies"
    victim.send_signal(signal.SIGKILL)
    mapped = [other.communicate(timeout=60)[0].split() for other in others]
    victim.communicate()
    assert record.read_text().split() == [names[0], *names], "each by one of them"
    assert mapped[0] == mapped[1], "the same files"
    assert len(mapped[0]) == FILES
    assert copies(root) == digests(far)
    assert all(path.suffix == ".arrow" or path.name == "lock" for path in root.iterdir())

"""Copies of shards on a disk of this machine, made while the training goes on.

Rows come from all over the shards, so to wait for a file on its first use would be to wait for nearly all of them
before the first step. Instead rows are read from where they lie until their file is here. A thread of each rank goes
through the files; all ranks of a machine take turns under one lock, so each file is copied once, and the network is
left to the rows that are read meanwhile. A copy is named by its SHA-256, as the manifest has it, and has that name when
it is what the manifest says; whoever is killed leaves no lock, and a `.part` that the next one to start removes.

For room, files that belong to other runs go, those used longest ago first; who has them mapped reads on. One's own
never make room for each other: each is used as often as any, so that would be copying without end.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipelines.formats.shards import ShardFile, Shards, verify_file
from pipelines.host_cache import exclusive_lock, user_cache_folder

log = logging.getLogger(__name__)

SPARE = 0.1
"""Share of the disk that is left to others."""


class Wanted(NamedTuple):
    """A file of some shards, by its number, and where its copy is to be."""

    shards: Shards
    number: int
    file: ShardFile
    copy: Path


class ShardCopier(threading.Thread):
    """Copies shards to this machine, as far as there is room, and has their rows read from there.

    A daemon: a run that ends does not wait for it.
    """

    def __init__(self, shards: Sequence[Shards], limit: float, root: Path | None = None) -> None:
        """Nothing is done before `start`.

        Args:
            shards: all that this process reads.
            limit: bytes that all copies on this machine may have together.
            root: where copies are; this user's own folder among the temporary ones if not given.
        """
        super().__init__(name="shard-copier", daemon=True)
        self._shards, self._limit, self._root = shards, limit, root
        self._failure: Exception | None = None

    def check(self) -> None:
        """Look whether it has failed, without waiting.

        Raises:
            StageFailed, ...: a shard is not what its manifest says, or the folder of copies is somebody else's.
        """
        if self._failure:
            raise self._failure

    def run(self) -> None:
        """Bring all files here; what goes wrong with the disk is said, and rows are read from where they lie."""
        try:
            self._bring(user_cache_folder("shards", self._root))
        except OSError as error:
            log.warning("no more shards are copied to this machine, the rest is read from where it lies: %s", error)
        except Exception as error:  # noqa: BLE001 raised in the training, by `check`
            self._failure = error

    def _bring(self, root: Path) -> None:
        wanted = [
            Wanted(shards, number, file, root / f"{file.sha256}.arrow")
            for shards in self._shards
            for number, file in enumerate(shards.manifest.files)
        ]
        own = {each.copy for each in wanted}
        with exclusive_lock(root):
            for partial in root.glob("*.part"):  # of a process that was killed: the lock is ours
                partial.unlink()
            missing = [each for each in wanted if not _used(each)]
        for count, each in enumerate(missing):
            with exclusive_lock(root):
                if _used(each):
                    continue
                if not _room(root, each.file.bytes, self._limit, own):
                    here = len(wanted) - len(missing) + count
                    log.warning("there is room for %d of %d shard files in %s", here, len(wanted), root)
                    return
                _copy(each)
                _used(each)
        log.info("all %d shard files are in %s", len(wanted), root)


def _used(wanted: Wanted) -> bool:
    """Have rows read from a copy, if it is there; the lock keeps it there."""
    if not wanted.copy.exists() or wanted.copy.stat().st_size != wanted.file.bytes:
        return False
    os.utime(wanted.copy)
    wanted.shards.read_from(wanted.number, wanted.copy)
    return True


def _room(root: Path, needed: int, limit: float, own: set[Path]) -> bool:
    """Make room for a file, if removing those of other runs is enough for it."""
    copies = {path: path.stat() for path in root.glob("*.arrow")}
    disk = shutil.disk_usage(root)
    room = min(limit - sum(state.st_size for state in copies.values()), disk.free - SPARE * disk.total) - needed
    others = sorted(copies.keys() - own, key=lambda path: copies[path].st_mtime)
    if room + sum(copies[path].st_size for path in others) < 0:
        return False
    for path in others:
        if room >= 0:
            break
        path.unlink()
        room += copies[path].st_size
    return True


def _copy(wanted: Wanted) -> None:
    """Copy a file whole or not at all.

    Raises:
        StageFailed: it is not what the manifest says.
        OSError: it cannot be read, or the disk is full.
    """
    source, partial = wanted.shards.folder / wanted.file.file, wanted.copy.with_suffix(".part")
    try:
        shutil.copyfile(source, partial)
        verify_file(source, wanted.file, copy=partial)
        partial.rename(wanted.copy)
    finally:
        partial.unlink(missing_ok=True)

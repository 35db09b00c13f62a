"""Cache of shard files on a disk of the host, filled in the background during training.

Rows are read in random order. If a rank waited for the copy of each file, nearly all files would have to be copied
before the first step. A rank therefore reads rows from the original file until the copy of the file is complete. A
thread in each rank copies files. A lock lets only one rank of a host copy a file at a time. Each file is therefore
copied once, and most of the network bandwidth remains for reading rows.

A copy is named after the SHA-256 of the file. A copy gets this name only after the content of the copy has been
verified. A killed process leaves no lock, and the next process that starts removes the incomplete `.part` file.

If the disk space is needed, copies that belong to other runs are removed, least recently used copies first. A process
that has mapped a removed copy can still read the copy. A copy that belongs to this run is never removed. All shard
files of a run are used equally often, so a removed file would soon have to be copied again.
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
"""Fraction of the disk that is kept free for other programs."""


class CacheEntry(NamedTuple):
    """A shard file of `shards`, with its number, its manifest entry, and the path of its copy."""

    shards: Shards
    number: int
    file: ShardFile
    copy: Path


class ShardCopier(threading.Thread):
    """Thread that copies shard files to this host while the disk has room, and redirects reads to the copies.

    The thread is a daemon thread, so a run can end while files are still being copied.
    """

    def __init__(self, shards: Sequence[Shards], limit: float, root: Path | None = None) -> None:
        """Create the thread. Copying begins when `start` is called.

        Args:
            shards: all shards that this process reads.
            limit: largest total size of all copies on this host, in bytes.
            root: folder of the copies, by default a folder of this user in the system's temporary folder.
        """
        super().__init__(name="shard-copier", daemon=True)
        self._shards, self._limit, self._root = shards, limit, root
        self._failure: Exception | None = None

    def check(self) -> None:
        """Raise the error of the thread if the thread has failed. This method does not wait for the thread.

        Raises:
            StageFailed: a shard file differs from its manifest, the folder of the copies belongs to another user, or
                all users may write to this folder.
        """
        if self._failure:
            raise self._failure

    def run(self) -> None:
        """Copy all files. Disk errors are logged, and the remaining rows are read from the original files."""
        try:
            self._copy_all(user_cache_folder("shards", self._root))
        except OSError as error:
            log.warning(
                "copying shards to this host stopped, so the remaining rows are read from the original files: %s", error
            )
        except Exception as error:  # noqa: BLE001 raised in the training loop by `check`
            self._failure = error

    def _copy_all(self, root: Path) -> None:
        entries = [
            CacheEntry(shards, number, file, root / f"{file.sha256}.arrow")
            for shards in self._shards
            for number, file in enumerate(shards.manifest.files)
        ]
        own = {entry.copy for entry in entries}
        with exclusive_lock(root):
            # no running process writes these files, because this process holds the lock
            for partial in root.glob("*.part"):
                partial.unlink()
            missing = [entry for entry in entries if not _use_copy(entry)]
        for count, entry in enumerate(missing):
            with exclusive_lock(root):
                if _use_copy(entry):
                    continue
                if not _make_room(root, entry.file.bytes, self._limit, own):
                    copied = len(entries) - len(missing) + count
                    log.warning("only %d of %d shard files fit into the cache folder %s", copied, len(entries), root)
                    return
                _copy(entry)
                _use_copy(entry)
        log.info("all %d shard files are in %s", len(entries), root)


def _use_copy(entry: CacheEntry) -> bool:
    """Redirect reads to the file's copy if a copy of the right size exists.

    Return False if there is no copy of the right size. The caller must hold the lock of the cache folder.
    """
    if not entry.copy.exists() or entry.copy.stat().st_size != entry.file.bytes:
        return False
    os.utime(entry.copy)
    entry.shards.use_copy(entry.number, entry.copy)
    return True


def _make_room(root: Path, needed: int, limit: float, own: set[Path]) -> bool:
    """Remove copies of other runs until there is room for a file.

    If even the removal of all copies of other runs would not make enough room, remove no copy and return False.

    Args:
        root: folder of the copies.
        needed: size of the file, in bytes.
        limit: largest total size of all copies, in bytes.
        own: paths of the copies that belong to this run, which are never removed.
    """
    copies = {path: path.stat() for path in root.glob("*.arrow")}
    disk = shutil.disk_usage(root)
    free_bytes = min(limit - sum(state.st_size for state in copies.values()), disk.free - SPARE * disk.total) - needed
    others = sorted(copies.keys() - own, key=lambda path: copies[path].st_mtime)
    if free_bytes + sum(copies[path].st_size for path in others) < 0:
        return False
    for path in others:
        if free_bytes >= 0:
            break
        path.unlink()
        free_bytes += copies[path].st_size
    return True


def _copy(entry: CacheEntry) -> None:
    """Copy a shard file atomically, and verify the content of the copy.

    Raises:
        StageFailed: the content differs from the manifest.
        OSError: the file cannot be read, or the disk is full.
    """
    source, partial = entry.shards.folder / entry.file.file, entry.copy.with_suffix(".part")
    try:
        shutil.copyfile(source, partial)
        verify_file(source, entry.file, copy=partial)
        partial.rename(entry.copy)
    finally:
        partial.unlink(missing_ok=True)

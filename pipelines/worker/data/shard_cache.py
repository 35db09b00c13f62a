"""Cache of shard files on a disk of the host, filled in the background during training.

Rows are read in random order, so waiting for each file on its first use would delay the first step until nearly all
files were copied. Instead rows are read from the original file until its copy is complete. A thread in each rank copies
the files. The ranks of a host take turns under one lock, so each file is copied once and most of the network bandwidth
is left to reads of rows.

A copy is named by its SHA-256 and gets that name after its content has been verified. A killed process leaves no lock,
and its partial `.part` file is removed by the next process that starts.

To make room, files of other runs are removed, least recently used first; processes that have them mapped can still
read them. Files of the run itself are never evicted for each other: all are used equally often, so evicting one would
mean copying it again without end.
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
    """A shard file, given by its shards and its number in them, and the path of its copy."""

    shards: Shards
    number: int
    file: ShardFile
    copy: Path


class ShardCopier(threading.Thread):
    """Thread that copies shard files to this host, as far as there is room, and redirects reads to the copies.

    It is a daemon thread, so a run that ends does not wait for it.
    """

    def __init__(self, shards: Sequence[Shards], limit: float, root: Path | None = None) -> None:
        """Create the thread; copying begins with `start`.

        Args:
            shards: all shards that this process reads.
            limit: total size of all copies on this host, in bytes.
            root: folder of the copies; by default the user's own folder under the temporary directory.
        """
        super().__init__(name="shard-copier", daemon=True)
        self._shards, self._limit, self._root = shards, limit, root
        self._failure: Exception | None = None

    def check(self) -> None:
        """Raise the error of the thread if it has failed; do not wait for it.

        Raises:
            StageFailed: a shard file differs from its manifest, or the folder of the copies is another user's.
        """
        if self._failure:
            raise self._failure

    def run(self) -> None:
        """Copy all files. Disk errors are logged, and the remaining rows are read from the original files."""
        try:
            self._copy_all(user_cache_folder("shards", self._root))
        except OSError as error:
            log.warning(
                "copying shards to this host has stopped; other rows are read from the original files: %s", error
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
            for partial in root.glob("*.part"):  # left by a killed process: this process holds the lock
                partial.unlink()
            missing = [entry for entry in entries if not _use_copy(entry)]
        for count, entry in enumerate(missing):
            with exclusive_lock(root):
                if _use_copy(entry):
                    continue
                if not _make_room(root, entry.file.bytes, self._limit, own):
                    copied = len(entries) - len(missing) + count
                    log.warning("there is room for %d of %d shard files in %s", copied, len(entries), root)
                    return
                _copy(entry)
                _use_copy(entry)
        log.info("all %d shard files are in %s", len(entries), root)


def _use_copy(entry: CacheEntry) -> bool:
    """Redirect reads to the file's copy if it exists. The caller holds the lock, so the copy cannot be removed."""
    if not entry.copy.exists() or entry.copy.stat().st_size != entry.file.bytes:
        return False
    os.utime(entry.copy)
    entry.shards.use_copy(entry.number, entry.copy)
    return True


def _make_room(root: Path, needed: int, limit: float, own: set[Path]) -> bool:
    """Remove copies of other runs until a file fits; remove nothing and return False if that would not be enough.

    Args:
        root: folder of the copies.
        needed: size of the file, in bytes.
        limit: total size of all copies, in bytes.
        own: copies of this run, which are kept.
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
    """Copy a file atomically, and verify its content.

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

"""A model's files on a disk of this machine: copied there once, however many processes want them.

Whoever comes first holds a lock while it copies, and the others wait for it; a copy gets its name when it is complete,
so one that was killed leaves nothing that could be taken for it. The name tells which files were copied, by size and
time of change. Only the last few models stay.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pipelines.config import short_hash
from pipelines.host_cache import exclusive_lock, user_cache_folder

KEPT = 3
"""Models whose copies stay. A process has read its own within seconds of asking."""


def local_copy(folder: Path, root: Path | None = None) -> Path:
    """A copy of a folder's files on this machine, made now or found.

    Args:
        folder: on a network, complete, and never changed.
        root: where copies are; this user's own folder among the temporary ones if not given.

    Raises:
        StageFailed: the folder for copies belongs to somebody else, who could put another model there.
        OSError: the folder cannot be read, or the disk is full.
    """
    root = user_cache_folder("models", root)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    target = root / short_hash(str(folder), state)
    with exclusive_lock(root):
        if not target.is_dir():
            _copy(files, target)
        os.utime(target)
        _remove_others(root)
    return target


def _copy(files: list[Path], target: Path) -> None:
    partial = target.with_suffix(".part")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed: the lock is ours
    partial.mkdir()
    for path in files:
        shutil.copyfile(path, partial / path.name)
    partial.rename(target)


def _remove_others(root: Path) -> None:
    """Remove all but the copies that were asked for last, and what was never completed."""
    copies = sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    complete = [path for path in copies if not path.suffix]
    for path in {*copies} - {*complete[-KEPT:]}:
        shutil.rmtree(path, ignore_errors=True)

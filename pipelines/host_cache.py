"""Folders on local disk in which all processes of a user share copies of remote files, with one lock per folder."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.errors import StageFailed


def user_cache_folder(kind: str, root: Path | None = None) -> Path:
    """Return this user's cache folder on this host. Create the folder if it does not exist.

    Args:
        kind: kind of the copied files, such as `models`, which is part of the default folder's name.
        root: folder to use, or None for the default folder, which is in the system's temporary folder.

    Raises:
        StageFailed: the folder (or a link in its place) belongs to another user, or all users may write to the folder.
            A user who may write to the folder could replace its files.
        OSError: the folder cannot be created.
    """
    root = root or Path(tempfile.gettempdir()) / f"lakesight-{kind}-{os.getuid()}"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    owners, mode = {root.stat().st_uid, root.lstat().st_uid}, root.stat().st_mode
    if owners != {os.getuid()} or mode & stat.S_IWOTH:
        raise StageFailed(
            f"{kind} cannot be copied to local disk",
            where=str(root),
            got="every user may write to the folder" if mode & stat.S_IWOTH else "the folder belongs to another user",
            fix="remove the folder, or set TMPDIR to a folder of your own",
        )
    return root


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Hold a folder's lock while the block runs. If the process is killed, the kernel releases the lock."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

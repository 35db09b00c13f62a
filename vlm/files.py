"""Functions that write a file atomically and compute the SHA-256 of a file's content."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the same folder, and rename it to `path` when the `with` block ends without an error.

    A reader sees the whole old file or the whole new file, never a part of a file. The folder is created if it is
    missing. Several processes may write the same file simultaneously. Each process uses a different temporary name, and
    the last rename wins.

    Args:
        path: path of the file to write.
        sync: True to flush the bytes to disk before the rename, so that a power failure leaves no empty file; False for
            files that are useless after a crash, such as heartbeats.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")  # `path.name` may already have the maximum length
    try:
        yield temporary
        if sync:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

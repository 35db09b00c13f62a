"""Files that are whole or absent, and the digest of a file's content."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the same folder, and rename it to `path` when the block ends without an error.

    A reader sees the old file or the new one, never a part of either. The folder is created. Several processes may
    write the same file at once: each has its own temporary name, and the last rename wins.

    Args:
        path: the file to write.
        sync: flush the bytes to disk before the rename, so that a power failure leaves no empty file. False suits files
            that are worthless after a crash, such as heartbeats.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
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

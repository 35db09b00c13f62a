"""Functions that write a file atomically, hash the content of a file, and read the step of a training checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TRAINING_STEP = "training.json"
"""Name of the file of a training checkpoint that holds the number of the next step."""


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


def read_training_step(folder: Path) -> int:
    """Read the number of the next step of a training checkpoint.

    Raises:
        OSError, ValueError, KeyError: the file is missing or not valid.
    """
    return int(json.loads((folder / TRAINING_STEP).read_text(encoding="utf-8"))["step"])

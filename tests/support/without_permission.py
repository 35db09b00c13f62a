"""Context in which this process may not read a file, also if the tests run as root."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534


@contextmanager
def without_permission(path: Path) -> Iterator[None]:
    """Take the permission to read a file from this process while the block runs."""
    mode, user = path.stat().st_mode, os.geteuid()
    path.chmod(0)
    if user == 0:  # root may read every file
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)
        path.chmod(mode)

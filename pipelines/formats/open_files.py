"""Limit of open files of a process."""

from __future__ import annotations

import resource
from contextlib import suppress


def raise_open_file_limit(files: int) -> None:
    """Raise the soft limit of open files by `files`, up to the hard limit. A mapped file counts as an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        limit = soft + files if hard == resource.RLIM_INFINITY else min(soft + files, hard)
        # macOS may reject a limit that macOS itself reports; mapping a file then fails with a UserError
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))

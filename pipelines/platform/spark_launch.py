"""Function that opens the log of Spark's JVM so that other users of the machine cannot read the log."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO


def open_log(file: Path, umask: int) -> BinaryIO:
    """Open the log of the JVM to append bytes. Only users who may write the log can read the log.

    The JVM prints the variable JAVA_TOOL_OPTIONS, which may contain a password. With umask 022, only this user can read
    the log; with umask 002, the users of the file's group can write and read the log.
    """
    writable = 0o222 & ~umask
    mode = writable | writable << 1
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, mode)
    if os.fstat(descriptor).st_uid == os.getuid():
        os.fchmod(descriptor, mode)  # an earlier release created the log readable for every user
    return os.fdopen(descriptor, "ab")

"""What the processes of one user share on one machine: folders for copies of what lies on a network, and a lock."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.errors import StageFailed


def own_folder(kind: str, root: Path | None = None) -> Path:
    """A folder for copies on this machine, made now or found.

    Args:
        kind: what is copied; part of its name.
        root: where it is; among the temporary ones if not given.

    Raises:
        StageFailed: it belongs to somebody else, who could put other files there.
        OSError: it cannot be made.
    """
    root = root or Path(tempfile.gettempdir()) / f"lakesight-{kind}-{os.getuid()}"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise StageFailed(
            f"{kind} cannot be copied to this machine",
            where=str(root),
            got="a folder of another user",
            fix="remove it, or set TMPDIR to a folder of your own",
        )
    return root


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time works in a folder; a killed one leaves no lock behind."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

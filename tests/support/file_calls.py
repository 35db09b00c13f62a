"""Helper that records the paths of files that this process opens and of folders that this process lists."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

EVENTS = {"open": "opened", "os.listdir": "listed", "os.scandir": "listed"}


@dataclass
class FileCalls:
    """Files that were opened and folders that were listed below one folder while a block was running."""

    folder: Path
    opened: list[str] = field(default_factory=list)
    listed: list[str] = field(default_factory=list)


_active: list[FileCalls] = []


def _record(event: str, arguments: tuple[object, ...]) -> None:
    if _active and event in EVENTS:
        for calls in _active:
            if str(arguments[0]).startswith(str(calls.folder)):
                getattr(calls, EVENTS[event]).append(str(arguments[0]))


sys.addaudithook(_record)  # an audit hook cannot be removed


@contextmanager
def counted_calls(folder: Path) -> Iterator[FileCalls]:
    """While the block is running, record the files that are opened and the folders that are listed below a folder."""
    calls = FileCalls(folder)
    _active.append(calls)
    try:
        yield calls
    finally:
        _active.remove(calls)

"""Path and connection of the SQLite file in which MLflow stores runs and model versions of a home folder."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from pipelines.platform import Platform, sqlite_uri

WAIT_SECONDS = {"ro": 5.0, "rw": 60.0}
"""Longest time to wait for another process that writes to the store, in seconds, by the mode of the connection."""


def store_uris(platform: Platform) -> set[str]:
    """Return the URIs that MLflow accepts for the store in the home folder."""
    file = store_file(platform)
    return {sqlite_uri(file), f"sqlite:///{file}"}


def store_file(platform: Platform) -> Path:
    """Return the path of the store in the home folder. The file may be missing."""
    return platform.root / "mlflow.db"


@contextmanager
def open_store(file: Path, mode: Literal["ro", "rw"]) -> Iterator[sqlite3.Connection]:
    """Open an existing store to read (`ro`) or to read and write (`rw`), and close it after the block.

    Raises:
        sqlite3.Error: the file is missing.
    """
    uri = f"file:{quote(str(file))}?mode={mode}"
    with closing(sqlite3.connect(uri, uri=True, timeout=WAIT_SECONDS[mode])) as store:
        yield store

"""Functions for sources that consist of files: list the files, and select the files that have to be read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from glob import has_magic
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pyarrow as pa

from pipelines.config import DataConfig, short_hash
from pipelines.driver.ingest.ledger import items_table, pending_pairs
from pipelines.driver.ingest.sources.source import Source, SourceRows
from pipelines.driver.ingest.sources.walk import Found, PassedOver, file_reason, list_entries
from pipelines.errors import UserError
from pipelines.executor.ingest.records.folder import change_token
from pipelines.executor.ingest.records.record import refuse_denied
from pipelines.executor.ingest.splits import split_of_file
from pipelines.executor.ingest.storage import is_url, printable, refuse_secrets

MIN_RANGE_BYTES, MAX_RANGE_BYTES = 4 * 2**20, 32 * 2**20
"""Smallest and largest size of the range of a file that one task reads, in bytes. A file that is smaller than the
smallest size is read by one task."""
MIN_TASKS = 32
"""Number of tasks for a small input, so that no core is idle. There are fewer tasks in two cases: files are read in
ranges and the input is smaller than MIN_TASKS * MIN_RANGE_BYTES bytes, or there are fewer than MIN_TASKS files and each
file is read as a whole."""
SET_PATH = "give the path of a file or folder with --set data.source.path=PATH"
NO_ACCESS = "no access"
"""State of a file that this process has no permission to read. If the file becomes readable, its state changes, so the
next ingest reads the file."""
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
"""Name that Hive and Spark give to the partition of a null value."""


class SourceFile(NamedTuple):
    """One input file.

    Attributes:
        path: path or URL that executors open.
        name: file name, or path relative to the source if the split of the file is in the name of its folder.
        size: size of the file, in bytes.
        modified: modification time of the file, in microseconds since the epoch.
        item: name of the file in the ledger.
        accessible: whether this process may read the file.
        partition: values of the partition columns, from folders such as `year=2024` between the source's path and the
            file. A null value of a partition column is stored as None.
        version: text that changes whenever the file changes, if the modification time is not enough (`walk.Found`).
    """

    path: str
    name: str
    size: int
    modified: int
    item: str
    accessible: bool
    partition: Mapping[str, str | None]
    version: str = ""

    @property
    def state(self) -> str:
        """Change token of the file, made from the size, the modification time and the version."""
        if not self.accessible:
            return NO_ACCESS
        token = change_token(self.size, self.modified)
        return f"{token}, {self.version}" if self.version else token


class Listing(NamedTuple):
    """Files of a source that are read, and entries below the path of the source that are not read."""

    files: list[SourceFile]
    passed_over: list[PassedOver]


def range_bytes(size: int) -> int:
    """Return the number of bytes in a range of a file, given the total size of the input files."""
    return min(max(size // MIN_TASKS, MIN_RANGE_BYTES), MAX_RANGE_BYTES)


def count_tasks(files: Sequence[SourceFile], cores: int) -> int:
    """Return the number of tasks that read files as wholes. Each task reads one large file or many small files.

    With two tasks per core (if there are enough files), no core waits long for the last task.
    """
    size = sum(file.size for file in files)
    return min(len(files), max(MIN_TASKS, 2 * cores, size // range_bytes(size)))


def open_files(
    name: str, listing: Listing, ingested: pa.Table, load: Callable[[list[SourceFile]], SourceRows] | None
) -> Source:
    """Open a source of files. Files that have been ingested in their current state are not loaded.

    If `load` is None, no file is loaded, and the source only says which files are pending.
    """
    files = listing.files
    pending = pending_pairs(((file.item, file.state) for file in files), ingested)
    items = {item for item, _ in pending}
    to_read = [file for file in files if file.item in items]
    rows = load(to_read) if load and to_read else None
    if rows and (denied := frozenset(os.fsencode(file.path) for file in to_read if not file.accessible)):
        rows = rows._replace(read=partial(refuse_denied, read=rows.read, denied=denied))
    return Source(
        rows,
        _hash_files(name, files),
        items_table(pending),
        unchanged=len(files) - len(to_read),
        passed_over=tuple(listing.passed_over),
    )


def _hash_files(name: str, files: Sequence[SourceFile]) -> str:
    """Return the ingest_id: a hash of a data config's name and of its files' names, sizes, modification times and
    versions."""
    return short_hash(name, sorted((f.name, f.size, f.modified, *filter(None, [f.version])) for f in files))


def list_files(config: DataConfig, suffixes: tuple[str, ...]) -> Listing:
    """List the files at the path of the source, and select the files to read.

    The ledger uses the names and times that Spark reports, because earlier versions of Lakesight listed files through
    Spark. The name of a file is a URI such as `file:/x/a.csv`, and the modification time is rounded down to
    milliseconds.

    Raises:
        UserError: no path is set, the path cannot be listed, no file is selected, or a source of kind `parquet` is the
            folder of a Delta table.
    """
    listing = list_plain_files(config, suffixes)
    files = [f._replace(item=_spark_path(f.path), modified=f.modified // 1000 * 1000) for f in listing.files]
    return listing._replace(files=files)


def list_plain_files(config: DataConfig, suffixes: tuple[str, ...]) -> Listing:
    """List the files as `list_files` does, but use the plain path of a file as the file's name in the ledger.

    If the path of the source is a single file that is not empty, this file is read, whatever its suffix. With split
    kind `file`, only files whose name or folder contains the name of a split are read.

    Raises:
        UserError: no path is set, the path cannot be listed, no file is selected, or a source of kind `parquet` is the
            folder of a Delta table.
    """
    files: list[SourceFile] = []
    passed_over: list[PassedOver] = []
    for entry in _list_path(config.source.path):
        reason = entry.reason if isinstance(entry, PassedOver) else _reason(entry, config, suffixes)
        if isinstance(entry, Found) and reason is None:
            files.append(_source_file(entry, config))
        else:
            passed_over.append(PassedOver(printable(entry.relative), str(reason)))
    if config.source.kind == "parquet":
        _refuse_delta_tables(config.source.path, passed_over)
    if not files:
        raise _no_file(config, suffixes, passed_over)
    return Listing(sorted(files, key=lambda file: file.path), passed_over)


def require_readable(path: str) -> None:
    """Check that a file or a folder can be read, without listing the whole folder.

    A URL or a pattern is listed completely.

    Raises:
        UserError: no path is set, the path does not exist, or this user may not read it.
    """
    if not path or is_url(path) or has_magic(path) or "{" in path:
        _list_path(path)
        return
    with _readable(path):
        if Path(absolute_path(path)).is_dir():
            with os.scandir(absolute_path(path)) as entries:
                next(entries, None)
        else:
            with Path(absolute_path(path)).open("rb") as file:
                file.read(1)


def _list_path(path: str) -> list[Found | PassedOver]:
    if not path:
        raise UserError("the run has no input", where="data.source.path", got="nothing", fix=SET_PATH)
    with _readable(path):
        return list_entries(absolute_path(path))


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """Convert errors of the file system to UserError."""
    try:
        yield
    except OSError as error:
        absent = isinstance(error, FileNotFoundError)
        got = "no such file or folder" if absent else error.strerror or str(error)
        raise UserError("the input cannot be read", where=path, got=got, fix=SET_PATH) from None


def _reason(found: Found, config: DataConfig, suffixes: tuple[str, ...]) -> str | None:
    """Return why a file is passed over, or None if the file is read."""
    name = found.relative.rpartition("/")[2]
    if not found.named and (reason := file_reason(name)):
        return reason
    if not found.size:
        return "empty"
    if not found.named and not name.lower().endswith(suffixes):
        return "other_kind"
    return "no_split" if config.split.kind == "file" and split_of_file(found.relative) is None else None


def _source_file(found: Found, config: DataConfig) -> SourceFile:
    relative = printable(found.relative)
    *folders, name = relative.split("/")
    if config.split.kind == "file" and split_of_file(name) is None:
        name = relative  # executors read the split of the file from the folder's name
    pairs = [folder.split("=", 1) for folder in folders if "=" in folder]
    partition = {unquote(key): None if value == NULL_PARTITION else unquote(value) for key, value in pairs}
    path = printable(found.path)
    return SourceFile(found.path, name, found.size, found.modified, path, found.accessible, partition, found.version)


def _refuse_delta_tables(path: str, passed_over: Sequence[PassedOver]) -> None:
    """Refuse to read a Delta table as Parquet files, because its folder may contain files with deleted rows."""
    for entry in passed_over:
        if entry.relative.rstrip("/").rpartition("/")[2] == "_delta_log":
            raise UserError(
                "the input is the folder of a Delta table, whose files also contain deleted rows",
                where=path,
                got=f"the folder {entry.relative}",
                fix="read the folder as a Delta table: --set data.source.kind=table",
            )


def _no_file(config: DataConfig, suffixes: tuple[str, ...], passed_over: Sequence[PassedOver]) -> UserError:
    expected = f"files ending in {', '.join(suffixes)}"
    if config.split.kind == "file":
        expected += ", named train, val or test because data.split.kind is file"
    others = [entry for entry in passed_over if entry.reason != "empty"]
    got = ", ".join(f"{entry.relative} ({entry.reason})" for entry in others[:10])
    if not others:
        got = "no files, or only empty ones"
    return UserError("the input has no file to read", where=config.source.path, got=got, fix=f"expected {expected}")


def _spark_path(path: str) -> str:
    """Return a path in Spark's notation, such as `file:/x/a.csv`."""
    if is_url(path):
        return path
    return f"dbfs:{printable(path)}" if path.startswith("/Volumes/") else f"file:{printable(path)}"


def absolute_path(path: str) -> str:
    """Return the absolute path without `.` and `..`.

    A URL of a local file (file:/...) or of a Volume (dbfs:/Volumes/...) becomes a plain path. Any other URL, and any
    other path that begins with `dbfs:`, is returned unchanged.

    Raises:
        UserError: the path is a URL with a password, a query or a fragment.
    """
    refuse_secrets(path, "data.source.path")
    if found := re.fullmatch(r"file:(?://)?(/.*)|dbfs:(/Volumes/.*)", path):
        path = found[1] or found[2]
    return path if is_url(path) or path.startswith("dbfs:") else os.path.abspath(path)  # noqa: PTH100 (resolves `..`)


def source_folder(config: DataConfig) -> Path:
    """Return the path of the source as a plain path that executors can open.

    Raises:
        UserError: no path is set, or the path is a URL.
    """
    if not config.source.path:
        raise UserError("the run has no input", where="data.source.path", got="nothing", fix=SET_PATH)
    path = absolute_path(config.source.path)
    if is_url(path):
        raise UserError(
            f"a source of kind {config.source.kind} needs a folder, and cannot read a URL",
            where=config.source.path,
            got="a URL",
            fix="give a folder that every executor sees, such as a Volume (/Volumes/...) or a network drive",
        )
    return Path(path)

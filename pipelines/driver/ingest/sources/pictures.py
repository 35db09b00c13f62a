"""Location and parser of the pictures to which the rows of a source refer by paths or URIs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from glob import has_magic
from pathlib import Path

from pipelines.config import DataConfig, RowSourceBase
from pipelines.driver.ingest.sources.files import absolute_path
from pipelines.executor.ingest.records.pictures.root import (
    is_absolute,
    picture_records,
    plain_location,
    replayed_picture_records,
    require_root,
)
from pipelines.executor.ingest.records.record import Read, Record
from pipelines.executor.ingest.storage import is_url


def read_named_pictures(config: DataConfig, read: Read) -> Read:
    """Return a parser that also reads the pictures to which rows refer, or `read` itself if rows contain the pictures.

    A relative location of the pictures is relative to the folder of the row's file (column `path` of the raw rows). For
    a table, the location is relative to the working folder.

    Raises:
        UserError: pictures cannot be read from the location.
    """
    location = _location(config)
    if location is None:
        return read
    base = None if _is_single_file(config) else _folder_of(config)
    return partial(_reader(picture_records, config, location), read=read, base=base)


def read_replayed_pictures(config: DataConfig, read: Read) -> Read:
    """Return a parser of rows of `quarantine` that reads the same pictures as `read_named_pictures`.

    Raises:
        UserError: pictures cannot be read from the location.
    """
    location = _location(config)
    if location is None:
        return read
    if is_absolute(location):
        return partial(_reader(picture_records, config, location), read=read, base=None, is_replay=True)
    replayed = _reader(replayed_picture_records, config, location)
    return partial(replayed, read=read, base=_folder_of(config), single_file=_is_single_file(config))


def _location(config: DataConfig) -> str | None:
    """Return the location of the pictures, or None if rows contain the pictures. Check an absolute location."""
    source = config.source
    if not isinstance(source, RowSourceBase) or source.image_root is None:
        return None
    location = plain_location(source.image_root)
    if config.source.kind == "table" and not is_absolute(location):
        location = str(Path.cwd() / location)
    if is_absolute(location):
        require_root(location)
    return location


def _reader(
    function: Callable[..., Iterator[Record]], config: DataConfig, location: str
) -> Callable[..., Iterator[Record]]:
    """Set the arguments of a parser in `records.pictures.root` that depend on the config."""
    source = config.source
    assert isinstance(source, RowSourceBase)
    return partial(function, location=location, column=source.columns.image, max_bytes=config.limits.max_bytes)


def reads_urls(config: DataConfig) -> bool:
    """Return whether executors open URLs: the files of the source, or the pictures to which its rows refer."""
    source = config.source
    root = source.image_root if isinstance(source, RowSourceBase) else None
    return is_url(source.path) or is_url(root or "")


def _is_single_file(config: DataConfig) -> bool:
    """Return whether the path of the source names one local file, so that all rows come from one folder."""
    return Path(absolute_path(config.source.path)).is_file()


def _folder_of(config: DataConfig) -> str:
    """Return a folder or URL that contains all files of the source, directly or in subfolders."""
    path = absolute_path(config.source.path)
    if Path(path).is_dir():
        return path
    folder = os.path.dirname(path)  # noqa: PTH120 (the path may be a URL)
    while has_magic(folder) or "{" in folder:
        folder = os.path.dirname(folder)  # noqa: PTH120
    return folder

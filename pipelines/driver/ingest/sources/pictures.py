"""Location and parser of the pictures to which the rows of a source refer by paths or URIs."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from pipelines.config import DataConfig, RowSourceBase
from pipelines.driver.ingest.sources.files import absolute_path
from pipelines.executor.ingest.records.pictures.root import is_absolute, picture_records, plain_location, require_root
from pipelines.executor.ingest.records.record import Read
from pipelines.executor.ingest.storage import is_url


def read_named_pictures(config: DataConfig, read: Read, *, knows_files: bool) -> Read:
    """Return a parser that also reads the pictures to which rows refer, or `read` itself if rows contain the pictures.

    Args:
        config: data config of the source.
        read: function that parses raw rows of the source into records.
        knows_files: whether the raw rows have a column `path` with the path of the row's file; if true, a relative
            location of the pictures is relative to the folder of this file.

    Raises:
        UserError: pictures cannot be read from the location.
    """
    source = config.source
    if not isinstance(source, RowSourceBase) or source.image_root is None:
        return read
    location = plain_location(source.image_root)
    if not is_absolute(location) and not knows_files:
        location = os.path.join(_folder_of(config), location)  # noqa: PTH118 (the folder may be a URL)
    if is_absolute(location):
        require_root(location)
    return partial(
        picture_records, read=read, location=location, column=source.columns.image, max_bytes=config.limits.max_bytes
    )


def reads_urls(config: DataConfig) -> bool:
    """Return whether executors open URLs: the files of the source, or the pictures to which its rows refer."""
    source = config.source
    root = source.image_root if isinstance(source, RowSourceBase) else None
    return is_url(source.path) or is_url(root or "")


def _folder_of(config: DataConfig) -> str:
    """Return the folder of the source's files, or the working folder if the source is a table."""
    if config.source.kind == "table":
        return str(Path.cwd())
    path = absolute_path(config.source.path)
    return path if Path(path).is_dir() else os.path.dirname(path)  # noqa: PTH120

"""WebDataset sources: tar files that executors read as streams, one row at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from glob import glob
from pathlib import Path

from pyspark.sql import SparkSession

from pipelines.config import DataConfig, WebDatasetSourceConfig
from pipelines.driver.ingest.sources.files import SET_PATH, SourceFile, select_files, source_folder
from pipelines.driver.ingest.sources.source import SourceRows
from pipelines.errors import UserError
from pipelines.executor.ingest.records.webdataset import tar_records

SUFFIXES = (".tar", ".tar.gz", ".tgz")


def list_tars(config: DataConfig) -> list[SourceFile]:
    """List the tar files at the path of the source, which may be a file, a folder or a glob pattern.

    Raises:
        UserError: no tar file has this path.
    """
    path = source_folder(config)
    found = [Path(one) for one in glob(str(path / "*") if path.is_dir() else str(path))]  # noqa: PTH207 (a pattern)
    if not found:
        raise UserError("the input cannot be read", where=str(path), got="no such file or folder", fix=SET_PATH)
    stats = [(one, one.stat()) for one in found if one.is_file()]
    files = [SourceFile(str(one), one.name, stat.st_size, stat.st_mtime_ns // 1000) for one, stat in stats]
    return select_files(files, config, SUFFIXES)


def load_rows(
    spark: SparkSession, source: WebDatasetSourceConfig, config: DataConfig, files: Sequence[SourceFile]
) -> SourceRows:
    """Return one raw row per tar file. Each raw row is read by a separate task."""
    frame = spark.createDataFrame([(file.path,) for file in files], "path string")
    read = partial(tar_records, images=source.columns.image.split(";"), max_bytes=config.limits.max_bytes)
    return SourceRows(frame.coalesce(1).repartition(len(files)), read)

"""WebDataset tars: a task a tar, which executors read as a stream, a row at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from glob import glob
from pathlib import Path

from pyspark.sql import SparkSession

from pipelines.config import DataConfig, WebDatasetSourceConfig
from pipelines.driver.ingest.sources.files import SET_PATH, Rows, SourceFile, chosen, plain_folder
from pipelines.errors import UserError
from pipelines.executor.ingest.files import tar_records

SUFFIXES = (".tar", ".tar.gz", ".tgz")


def files_of(config: DataConfig) -> list[SourceFile]:
    """The tars of the source's path.

    Raises:
        UserError: no such file.
    """
    return chosen(_listed(plain_folder(config)), config, SUFFIXES)


def rows(spark: SparkSession, source: WebDatasetSourceConfig, config: DataConfig, files: Sequence[SourceFile]) -> Rows:
    """All rows of the tars."""
    frame = spark.createDataFrame([(file.path,) for file in files], "path string")
    read = partial(tar_records, images=source.columns.image.split(";"), max_bytes=config.limits.max_bytes)
    return Rows(frame.coalesce(1).repartition(len(files)), read)


def _listed(path: Path) -> list[SourceFile]:
    found = [Path(one) for one in glob(str(path / "*") if path.is_dir() else str(path))]  # noqa: PTH207 (a pattern)
    if not found:
        raise UserError("the input cannot be read", where=str(path), got="no such file or folder", fix=SET_PATH)
    stats = [(one, one.stat()) for one in found if one.is_file()]
    return [SourceFile(str(one), one.name, stat.st_size, stat.st_mtime_ns // 1000) for one, stat in stats]

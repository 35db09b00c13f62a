"""WebDataset tars: a task a tar, which executors read as a stream, a row at a time."""

from __future__ import annotations

from functools import partial
from glob import glob
from pathlib import Path

from pyspark.sql import SparkSession

from pipelines.config import DataConfig, WebDatasetSourceConfig
from pipelines.driver.sources.files import SET_PATH, Source, SourceFile, chosen, hash_of, plain_folder
from pipelines.errors import UserError
from pipelines.executor.files import tar_records

SUFFIXES = (".tar", ".tar.gz", ".tgz")


def open_webdataset(spark: SparkSession, name: str, source: WebDatasetSourceConfig, config: DataConfig) -> Source:
    """All rows of the tars.

    Raises:
        UserError: no such file.
    """
    files = chosen(_listed(plain_folder(config)), config, SUFFIXES)
    rows = spark.createDataFrame([(file.path,) for file in files], "path string")
    read = partial(tar_records, images=source.columns.image.split(";"), max_bytes=config.limits.max_bytes)
    return Source(rows.coalesce(1).repartition(len(files)), read, hash_of(name, files))


def _listed(path: Path) -> list[SourceFile]:
    found = [Path(one) for one in glob(str(path / "*") if path.is_dir() else str(path))]  # noqa: PTH207 (a pattern)
    if not found:
        raise UserError("the input cannot be read", where=str(path), got="no such file or folder", fix=SET_PATH)
    stats = [(one, one.stat()) for one in found if one.is_file()]
    return [SourceFile(str(one), one.name, stat.st_size, stat.st_mtime_ns // 1000) for one, stat in stats]

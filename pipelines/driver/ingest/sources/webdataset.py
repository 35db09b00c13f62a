"""WebDataset sources: tar files that executors read as streams, one row at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

from pyspark.sql import SparkSession

from pipelines.config import DataConfig, WebDatasetSourceConfig
from pipelines.driver.ingest.sources.files import SourceFile, count_tasks
from pipelines.driver.ingest.sources.source import SourceRows, used_columns
from pipelines.executor.ingest.records.webdataset import tar_records
from pipelines.platform.session import default_parallelism

SUFFIXES = (
    *(f".tar{compression}" for compression in ("", ".gz", ".bz2", ".xz", ".zst")),
    *(".tgz", ".tbz", ".tbz2", ".txz", ".tzst"),
)
"""Suffixes of the tar files that are read from a folder. The compression of a tar file is recognised by the content of
the file."""


def load_rows(
    spark: SparkSession, source: WebDatasetSourceConfig, config: DataConfig, files: Sequence[SourceFile]
) -> SourceRows:
    """Return one raw row per tar file. A task reads many small tar files or a few large tar files."""
    frame = spark.createDataFrame([(os.fsencode(f.path), f.name) for f in files], "path binary, file string")
    images, named = source.columns.image.split(";"), tuple(used_columns(config).values())
    read = partial(tar_records, images=images, named=named, max_bytes=config.limits.max_bytes)
    return SourceRows(frame.coalesce(1).repartition(count_tasks(files, default_parallelism(spark))), read)

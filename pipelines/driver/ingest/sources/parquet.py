"""Parquet sources: executors use Arrow to read the row groups of the files, and read only the used columns.

Spark does not read the files, because Spark would refuse the whole input if a single column had a type, name or value
that Spark cannot read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import attrgetter

from pyspark.sql import SparkSession

from pipelines.config import DataConfig
from pipelines.driver.ingest.sources.files import SourceFile, range_bytes
from pipelines.driver.ingest.sources.source import SourceRows, require_columns, used_columns
from pipelines.executor.ingest.records.parquet import parquet_records
from pipelines.executor.ingest.records.parquet_file import ParquetColumns
from pipelines.executor.ingest.storage import FILE_ERRORS, require_damage

SUFFIXES = (".parquet", ".parq", ".pq", ".parquet.gzip")
"""Suffixes of Parquet files. The last suffix comes from the documentation of pandas; a file with this suffix is an
ordinary Parquet file."""
SCHEMA = "path string, file string, start bigint, end bigint, partition map<string, string>"


def load_rows(spark: SparkSession, config: DataConfig, files: Sequence[SourceFile]) -> SourceRows:
    """Load the rows of the files. Columns that the ingest does not use may differ between the files.

    A file that lacks a used column is refused as a whole.

    Raises:
        UserError: no readable file has all columns of the data config.
    """
    _require_columns(config, files)
    size = sum(file.size for file in files)
    per_task = range_bytes(size)
    ranges = [
        (file.path, file.name, start, min(start + per_task, file.size), dict(file.partition))
        for file in files
        for start in range(0, file.size, per_task)
    ]
    rows = spark.createDataFrame(ranges, SCHEMA).repartitionByRange(1 + size // per_task, "path", "start")
    named = tuple(used_columns(config).values())
    image = config.source.columns.image
    return SourceRows(rows, partial(parquet_records, image=image, named=named, max_bytes=config.limits.max_bytes))


def _require_columns(config: DataConfig, files: Sequence[SourceFile]) -> None:
    """Look for a file that has all used columns. A damaged file is left to the executors, which refuse the file."""
    used = used_columns(config).values()
    found: list[str] | None = None
    for file in filter(attrgetter("accessible"), files):
        try:
            with ParquetColumns(file.path) as opened:
                names = [*opened.names, *file.partition]
        except FILE_ERRORS as error:
            require_damage(error)
            continue
        if set(used) <= set(names):
            return
        found = found or names
    if found is not None:
        require_columns(config, found, config.source.path)

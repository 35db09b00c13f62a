"""Readers: a source as it says it, nothing decoded yet. A further kind of source is one more module here.

The contract is `Source` (in `files`): a DataFrame in whatever columns suit the reader, a function of
`pipelines.executor` that makes records of them on an executor, an id that tells whether the source is the same as last
time, and the items (files, mostly) that the rows are of. What was taken in before is left out.
"""

from __future__ import annotations

from functools import partial

import pyarrow as pa
from pyspark.sql import SparkSession

from pipelines.config import (
    CsvSourceConfig,
    DataConfig,
    FolderSourceConfig,
    JsonlSourceConfig,
    ParquetSourceConfig,
    TableSourceConfig,
    WebDatasetSourceConfig,
)
from pipelines.driver.ingest.sources import csv, jsonl, parquet, webdataset
from pipelines.driver.ingest.sources.files import Rows, Source, files_of, source_of
from pipelines.driver.ingest.sources.folder import open_folder
from pipelines.driver.ingest.sources.scenes import with_scenes_drawn
from pipelines.driver.ingest.sources.table import open_table
from pipelines.platform import Platform

__all__ = ["Rows", "Source", "open_source"]


def open_source(spark: SparkSession, platform: Platform, name: str, config: DataConfig, taken: pa.Table) -> Source:
    """Open what a data config names as its source.

    Args:
        spark: the session.
        platform: where generated input is kept.
        name: the data config's name.
        config: the data config.
        taken: the items that need no reading (`ledger.taken_in`).

    Raises:
        UserError: nothing there, nothing of the kind, or a column that is missing.
    """
    config = with_scenes_drawn(config, platform)
    match config.source:
        case CsvSourceConfig() as source:
            files, read = files_of(spark, config, csv.SUFFIXES), partial(csv.rows, spark, source, config)
        case JsonlSourceConfig():
            files, read = files_of(spark, config, jsonl.SUFFIXES), partial(jsonl.rows, spark, config)
        case ParquetSourceConfig() as source:
            files, read = files_of(spark, config, parquet.SUFFIXES), partial(parquet.rows, spark, source, config)
        case WebDatasetSourceConfig() as source:
            files, read = webdataset.files_of(config), partial(webdataset.rows, spark, source, config)
        case TableSourceConfig() as source:
            return open_table(spark, name, source, config, taken)
        case FolderSourceConfig() as source:
            return open_folder(spark, name, source, config, taken)
    return source_of(name, files, taken, read)

"""Readers: a source as it says it, nothing decoded yet. A further kind of source is one more module here.

The contract is `Source` (in `files`): a DataFrame in whatever columns suit the reader, a function of
`pipelines.executor` that makes records of them on an executor, and an id that tells whether the source is the same as
last time.
"""

from __future__ import annotations

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
from pipelines.driver.sources.csv import open_csv
from pipelines.driver.sources.files import Source
from pipelines.driver.sources.folder import open_folder
from pipelines.driver.sources.jsonl import open_jsonl
from pipelines.driver.sources.parquet import open_parquet
from pipelines.driver.sources.scenes import with_scenes_drawn
from pipelines.driver.sources.table import open_table
from pipelines.driver.sources.webdataset import open_webdataset
from pipelines.platform import Platform

__all__ = ["Source", "open_source"]


def open_source(spark: SparkSession, platform: Platform, name: str, config: DataConfig) -> Source:
    """Open what a data config names as its source.

    Args:
        spark: the session.
        platform: where generated input is kept.
        name: the data config's name.
        config: the data config.

    Raises:
        UserError: nothing there, nothing of the kind, or a column that is missing.
    """
    config = with_scenes_drawn(config, platform)
    match config.source:
        case CsvSourceConfig() as source:
            return open_csv(spark, name, source, config)
        case JsonlSourceConfig() as source:
            return open_jsonl(spark, name, source, config)
        case ParquetSourceConfig() as source:
            return open_parquet(spark, name, source, config)
        case TableSourceConfig() as source:
            return open_table(spark, name, source, config)
        case FolderSourceConfig() as source:
            return open_folder(spark, name, source, config)
        case WebDatasetSourceConfig() as source:
            return open_webdataset(spark, name, source, config)

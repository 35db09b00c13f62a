"""Opening of a source with the module for the kind of source that a data config names."""

from __future__ import annotations

from dataclasses import replace
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
from pipelines.driver.ingest.sources.files import list_files, list_plain_files, open_files
from pipelines.driver.ingest.sources.folder import open_folder
from pipelines.driver.ingest.sources.pictures import read_named_pictures
from pipelines.driver.ingest.sources.scenes import follow_moved_file, generate_scenes
from pipelines.driver.ingest.sources.source import Source
from pipelines.driver.ingest.sources.table import open_table
from pipelines.platform import Platform


def open_source(spark: SparkSession, platform: Platform, name: str, config: DataConfig, ingested: pa.Table) -> Source:
    """Open the source of a data config. The parser of its rows also reads pictures that the rows name.

    Args:
        spark: Spark session.
        platform: location of generated input.
        name: name of the data config.
        config: data config of the source.
        ingested: items that need not be read again, from `ledger.read_ledger`.

    Raises:
        UserError: the input does not exist, has no file of this kind, or lacks a column, or the place of the pictures
            that rows name cannot be read.
    """
    given, config = config, generate_scenes(config, platform)
    if config is not given:
        [file] = list_files(config, csv.SUFFIXES).files
        ingested = follow_moved_file(ingested, file.item)
    opened = _open_rows(spark, name, config, ingested)
    if opened.rows is None:
        return opened
    read = read_named_pictures(config, opened.rows.read, knows_files=config.source.kind != "table")
    return replace(opened, rows=opened.rows._replace(read=read))


def _open_rows(spark: SparkSession, name: str, config: DataConfig, ingested: pa.Table) -> Source:
    match config.source:
        case CsvSourceConfig() as source:
            files, load = list_files(config, csv.SUFFIXES), partial(csv.load_rows, spark, source, config)
        case JsonlSourceConfig():
            files, load = list_files(config, jsonl.SUFFIXES), partial(jsonl.load_rows, spark, config)
        case ParquetSourceConfig():
            files, load = list_files(config, parquet.SUFFIXES), partial(parquet.load_rows, spark, config)
        case WebDatasetSourceConfig() as source:
            files = list_plain_files(config, webdataset.SUFFIXES)
            load = partial(webdataset.load_rows, spark, source, config)
        case TableSourceConfig() as source:
            return open_table(spark, name, source, config, ingested)
        case FolderSourceConfig() as source:
            return open_folder(spark, name, source, config, ingested)
    return open_files(name, files, ingested, load)

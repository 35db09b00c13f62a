"""Functions that open the source of a data config. The kind of the source decides which module opens the source."""

from __future__ import annotations

from collections.abc import Callable
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
    TextSourceConfig,
    WebDatasetSourceConfig,
)
from pipelines.driver.ingest.ledger import Ledger
from pipelines.driver.ingest.sources import csv, jsonl, parquet, text, webdataset
from pipelines.driver.ingest.sources.files import (
    Listing,
    SourceFile,
    list_files,
    list_plain_files,
    open_files,
    require_readable,
)
from pipelines.driver.ingest.sources.folder import check_captions, has_small_captions, open_folder, open_small_folder
from pipelines.driver.ingest.sources.pictures import read_named_pictures, reads_urls
from pipelines.driver.ingest.sources.scenes import SCHEME, follow_moved_file, generate_scenes
from pipelines.driver.ingest.sources.source import Source, SourceRows
from pipelines.driver.ingest.sources.table.open import (
    open_ingested_table,
    open_table,
    require_local_table,
    require_table,
)
from pipelines.driver.ingest.spill import SpillFolder
from pipelines.executor.ingest.storage import is_url, refuse_secrets
from pipelines.platform import Platform, allow_urls

CHECKED_FILES = 20
"""Largest number of CSV files whose headers are read before Spark starts."""


def open_source(
    spark: SparkSession,
    platform: Platform,
    name: str,
    config: DataConfig,
    ingested: pa.Table | Ledger,
    *,
    spill: SpillFolder | None = None,
) -> Source:
    """Open the source of a data config. If rows refer to pictures, the parser of the rows also reads the pictures.

    Args:
        spark: Spark session.
        platform: platform whose home folder holds generated input files.
        name: name of the source, which is the name of its data config.
        config: data config of the source.
        ingested: items that need not be read again, or the ledger that has these items.
        spill: folder for intermediate results, which must exist until the source has been ingested. Without this
            folder, the driver holds all rows of a captions file in memory.

    Raises:
        UserError: the input does not exist, has no file of the source's kind, or lacks a column; or the location of the
            pictures (`image_root`) cannot be read.
    """
    given, config = config, generate_scenes(config, platform)
    if isinstance(config.source, FolderSourceConfig):
        opened = open_folder(spark, name, config.source, config, ingested, spill=spill)
        return _with_named_pictures(opened, config)
    ingested = ingested.read() if isinstance(ingested, Ledger) else ingested
    if config is not given:
        [file] = list_files(config, csv.SUFFIXES).files
        ingested = follow_moved_file(ingested, file.item)
    if reads_urls(config):
        allow_urls(spark)
    return _with_named_pictures(_open_rows(spark, name, config, ingested), config)


def _with_named_pictures(opened: Source, config: DataConfig) -> Source:
    """If the rows of a source refer to pictures, let the parser of the rows also read the pictures."""
    if opened.rows is None or config.source.kind == "text":
        return opened
    read = read_named_pictures(config, opened.rows.read)
    return replace(opened, rows=opened.rows._replace(read=read))


def check_input(platform: Platform, config: DataConfig) -> None:
    """Before Spark starts, check that the input exists and that CSV files have the columns of the config.

    The columns are not checked if a source has more than CHECKED_FILES CSV files.

    On Databricks this function checks only that the path has no password or query, because Spark is already running. To
    save a second look-up over the network, inputs on an object store and tables of a catalog are also not checked.

    Raises:
        UserError: the path is a URL with a password or a query, the input does not exist or has no file of the source's
            kind, or the config names a column that no CSV file has.
    """
    path = config.source.path
    refuse_secrets(path, "data.source.path")
    if platform.kind == "databricks" or is_url(path) or path.startswith(SCHEME):
        return
    match config.source:
        case TableSourceConfig() as source:
            require_local_table(source)
        case FolderSourceConfig() as source:
            check_captions(source, config)
        case CsvSourceConfig() as source:
            files = _list_source(config).files
            if len(files) <= CHECKED_FILES:
                csv.csv_layouts(config, files, files[0].path if len(files) == 1 else source.where, source)
        case _:
            _list_source(config)


def check_access(spark: SparkSession, config: DataConfig) -> None:
    """Check that this user can read the source. For a folder, only the first entry is looked up.

    Raises:
        UserError: the input does not exist or cannot be read, or the table of a source lacks a column.
    """
    path = config.source.path
    refuse_secrets(path, "data.source.path")
    match config.source:
        case TableSourceConfig() as source:
            require_table(spark, source, config)
        case _ if path.startswith(SCHEME):
            return
        case _:
            require_readable(path)


def needs_spark(config: DataConfig) -> bool:
    """Return true if only Spark can find out which items of a source are pending.

    Raises:
        UserError: the captions file of a folder does not exist.
    """
    if is_url(config.source.path):
        return True  # listing an object store takes long, so only `open_source` lists the store
    return isinstance(config.source, FolderSourceConfig) and not has_small_captions(config.source, config)


def open_unchanged(platform: Platform, name: str, config: DataConfig, ingested: pa.Table) -> Source | None:
    """Open a source without Spark. Return None if an item is pending, or if only Spark can find pending items. Callers
    call `needs_spark` first. Otherwise, they might read the ledger of a large source in vain.

    Args:
        platform: platform whose home folder holds generated input files.
        name: name of the source, which is the name of its data config.
        config: data config of the source.
        ingested: items that need not be read again, from `ledger.read_ledger_of_files`.

    Raises:
        UserError: the input does not exist, has no file of the source's kind, or lacks a column.
    """
    if needs_spark(config):
        return None
    given, config = config, generate_scenes(config, platform)
    match config.source:
        case TableSourceConfig() as source:
            opened = open_ingested_table(name, source, ingested)
        case FolderSourceConfig() as source:
            opened = open_small_folder(name, source, config, ingested)
        case _:
            files = _list_source(config)
            if config is not given:
                ingested = follow_moved_file(ingested, files.files[0].item)
            opened = open_files(name, files, ingested, load=None)
    return opened if opened is not None and not opened.num_pending else None


def _list_source(config: DataConfig) -> Listing:
    """List the files of a source that consists of files."""
    match config.source:
        case CsvSourceConfig():
            return list_files(config, csv.SUFFIXES)
        case JsonlSourceConfig():
            return list_files(config, jsonl.SUFFIXES)
        case ParquetSourceConfig():
            return list_files(config, parquet.SUFFIXES)
        case TextSourceConfig():
            return list_plain_files(config, text.SUFFIXES)
        case _:
            return list_plain_files(config, webdataset.SUFFIXES)


def _open_rows(spark: SparkSession, name: str, config: DataConfig, ingested: pa.Table) -> Source:
    load: Callable[[list[SourceFile]], SourceRows]
    match config.source:
        case CsvSourceConfig() as source:
            load = partial(csv.load_rows, spark, source, config)
        case JsonlSourceConfig():
            load = partial(jsonl.load_rows, spark, config)
        case ParquetSourceConfig():
            load = partial(parquet.load_rows, spark, config)
        case WebDatasetSourceConfig() as source:
            load = partial(webdataset.load_rows, spark, source, config)
        case TableSourceConfig() as source:
            return open_table(spark, name, source, config, ingested)
        case TextSourceConfig() as source:
            load = partial(text.load_rows, spark, source, config)
    return open_files(name, _list_source(config), ingested, load)

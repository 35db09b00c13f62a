"""Folder sources: a folder of picture files, and a captions file that names the picture files.

The captions file is CSV, JSON lines or COCO captions JSON. The driver reads a COCO document, and executors read the
other kinds. Executors open the pictures, so every executor must see the folder.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from pipelines.config import CsvSourceConfig, DataConfig, FolderSourceConfig, short_hash
from pipelines.driver.ingest.ledger import ITEMS, pending_items
from pipelines.driver.ingest.sources import csv, jsonl
from pipelines.driver.ingest.sources.files import SourceFile, source_folder
from pipelines.driver.ingest.sources.lines import COMPRESSION_SUFFIXES
from pipelines.driver.ingest.sources.source import Source, SourceRows, require_columns
from pipelines.errors import UserError
from pipelines.executor.ingest.records.coco import coco_columns, coco_records
from pipelines.executor.ingest.records.folder import (
    CAPTIONS,
    RECORDS,
    caption_records,
    folder_records,
    list_captions,
    parse_captions,
    store_records,
    subfolder_of,
)
from pipelines.executor.ingest.storage import describe_damage

CAPTION_BYTES_PER_TASK = 64 * 1024
"""Number of bytes of the captions file whose pictures one task looks up, which is a few hundred captions."""
MAX_TASKS = 10_000
COCO_SUFFIXES = tuple(f".json{compression}" for compression in COMPRESSION_SUFFIXES)


def open_folder(
    spark: SparkSession, name: str, source: FolderSourceConfig, config: DataConfig, ingested: pa.Table
) -> Source:
    """Open a folder. Each row of the captions file is one record. Pictures that no row names are ignored.

    In the ledger, an item is a row of the captions file, and the state of the item is the change token of its picture.
    Only added rows and rows with a changed picture are read again.

    Raises:
        UserError: the captions file does not exist, has an unknown format, or lacks a column.
    """
    folder = source_folder(config)
    file = _captions_file(folder / source.captions)
    captions = _load_captions(spark, file, source, config)
    tasks = min(1 + file.size // CAPTION_BYTES_PER_TASK, MAX_TASKS)
    column = source.columns.image
    list_rows = partial(list_captions, read=caption_records, captions=file.path, folder=str(folder), column=column)
    rows = captions.repartition(tasks).mapInArrow(list_rows, from_arrow_schema(CAPTIONS))
    items = rows.select(*ITEMS.names).toArrow().cast(ITEMS)
    pending = pending_items(items, ingested)
    distinct = items.group_by(ITEMS.names).aggregate([])
    if 0 < len(pending) < len(distinct):
        rows = rows.join(F.broadcast(spark.createDataFrame(pending.select(["item"]))), "item", "left_semi")
    parse = partial(
        folder_records,
        read=caption_records,
        folder=str(folder),
        column=column,
        max_bytes=config.limits.max_bytes,
        subfolder=subfolder_of(file.path, str(folder)),
    )
    ingest_id = short_hash(name, sorted(zip(*items.to_pydict().values(), strict=True)))
    return Source(SourceRows(rows, parse) if len(pending) else None, ingest_id, pending, len(distinct) - len(pending))


def _captions_file(path: Path) -> SourceFile:
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(
            "the captions file cannot be read",
            where=str(path),
            got=str(error.strerror),
            fix="--set data.source.path=FOLDER and --set data.source.captions=FILE, relative to the folder",
        ) from None
    modified = found.st_mtime_ns // 1000
    return SourceFile(str(path), path.name, found.st_size, modified, str(path), True, {})


def _load_captions(spark: SparkSession, file: SourceFile, source: FolderSourceConfig, config: DataConfig) -> DataFrame:
    """Return the records of the captions file in the schema RECORDS."""
    name = file.name.lower()
    if name.endswith(csv.SUFFIXES):
        rows = csv.load_rows(spark, CsvSourceConfig(multiline=True), config, [file])
    elif name.endswith(jsonl.SUFFIXES):
        rows = jsonl.load_rows(spark, config, [file])
    elif name.endswith(COCO_SUFFIXES):
        return spark.createDataFrame(_read_coco(file, source, config))
    else:
        raise UserError(
            "the captions file has an unknown format",
            where=file.path,
            got=f"a file named {file.name}",
            fix="expected CSV (.csv, .tsv), JSON lines (.jsonl) or COCO captions (.json)",
        )
    return rows.frame.mapInArrow(partial(parse_captions, read=rows.read), from_arrow_schema(RECORDS))


def _read_coco(file: SourceFile, source: FolderSourceConfig, config: DataConfig) -> pa.Table:
    require_columns(config, coco_columns(source.columns), file.path)
    try:
        records = list(coco_records(file.path, file.name, source.columns))
    except Exception as error:
        damage = describe_damage(error)
        if damage is None and not isinstance(error, ValueError):
            raise
        raise UserError(
            "the captions file is not COCO captions JSON",
            where=file.path,
            got=damage or str(error),
            fix="write one JSON object with images (id, file_name) and annotations (image_id, caption)",
        ) from None
    return pa.Table.from_batches(store_records(iter(records)), RECORDS)

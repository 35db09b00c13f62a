"""Folder sources: a folder of picture files, and a captions file that names the picture files.

The captions file is CSV, JSON lines or COCO captions JSON. Spark reads the captions file. Executors open the pictures,
so every executor must see the folder.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from pipelines.config import DataConfig, FolderSourceConfig, short_hash
from pipelines.driver.ingest.ledger import ITEMS, pending_items
from pipelines.driver.ingest.sources import csv, jsonl
from pipelines.driver.ingest.sources.files import SourceFile, load_text, source_folder, spark_literal
from pipelines.driver.ingest.sources.source import Source, SourceRows, require_columns
from pipelines.errors import UserError
from pipelines.executor.ingest.records.csv import spark_csv_records
from pipelines.executor.ingest.records.folder import (
    CAPTIONS,
    caption_records,
    folder_records,
    list_captions,
    subfolder_of,
)
from pipelines.executor.ingest.records.jsonl import jsonl_records
from pipelines.executor.ingest.records.record import Read
from pipelines.executor.ingest.records.table import FILE, table_records

CAPTION_BYTES_PER_TASK = 64 * 1024
"""Number of bytes of the captions file that one task reads, which is a few hundred captions. By default, Spark would
read the whole file in a single task."""
MAX_TASKS = 10_000
COCO = (
    "images array<struct<id: string, file_name: string, height: int, width: int>>, "
    "annotations array<struct<id: string, image_id: string, caption: string>>"
)


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
    captions, read = _load_captions(spark, file, source, config)
    tasks = min(1 + file.size // CAPTION_BYTES_PER_TASK, MAX_TASKS)
    column = source.columns.image
    list_rows = partial(list_captions, read=read, captions=file.path, folder=str(folder), column=column)
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


def _load_captions(
    spark: SparkSession, file: SourceFile, source: FolderSourceConfig, config: DataConfig
) -> tuple[DataFrame, Read]:
    name = file.name.lower()
    if name.endswith(csv.SUFFIXES):
        header = csv.read_header(spark, file, multiline=True)
        require_columns(config, header, file.path)
        return csv.parse(spark, [file.path], header, multiline=True), spark_csv_records
    if name.endswith(jsonl.SUFFIXES):
        rows = load_text(spark, [file.path])
        require_columns(config, jsonl.first_keys(rows), file.path)
        return rows, jsonl_records
    if name.endswith(".json"):
        rows = _load_coco(spark, file, source)
        require_columns(config, rows.columns[1:], file.path)
        return rows, partial(table_records, image=source.columns.image)
    raise UserError(
        "the captions file has an unknown format",
        where=file.path,
        got=f"a file named {file.name}",
        fix="expected CSV (.csv), JSON lines (.jsonl) or COCO captions (.json)",
    )


def _load_coco(spark: SparkSession, file: SourceFile, source: FolderSourceConfig) -> DataFrame:
    """Return one row per image with a list of captions. An annotation without an image also becomes a row."""
    document = spark.read.schema(COCO).json(spark_literal(file.path), multiLine=True)
    parts = document.selectExpr("images IS NOT NULL AND annotations IS NOT NULL AS coco").collect()
    if not (len(parts) == 1 and parts[0]["coco"]):
        raise UserError(
            "the captions file is not COCO captions JSON",
            where=file.path,
            got="a file without the lists images and annotations",
            fix="write one JSON object with images (id, file_name) and annotations (image_id, caption)",
        )
    captions = (
        document.selectExpr("inline(annotations)")
        .groupBy("image_id")
        .agg(F.array_sort(F.collect_list("caption")).alias(source.columns.text))
    )
    images = document.selectExpr("inline(images)").withColumnRenamed("file_name", source.columns.image)
    return images.join(captions, F.col("id") == F.col("image_id"), "full").select(
        F.lit(file.name).alias(FILE),
        F.coalesce("id", "image_id").alias("id"),
        source.columns.image,
        "height",
        "width",
        source.columns.text,
    )

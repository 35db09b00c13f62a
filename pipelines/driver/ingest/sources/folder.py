"""A folder of picture files and a captions file in it: CSV, JSON lines, or COCO captions JSON.

Spark reads the captions; executors open the pictures, so the folder must be one that they all see.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from pipelines.config import DataConfig, FolderSourceConfig, short_hash
from pipelines.driver.ingest.ledger import ITEMS, fresh_of
from pipelines.driver.ingest.sources import csv, jsonl
from pipelines.driver.ingest.sources.files import Rows, Source, SourceFile, demand_columns, plain_folder, text_of
from pipelines.errors import UserError
from pipelines.executor.ingest.files import LISTED, listed, listed_records, with_pictures
from pipelines.executor.ingest.records import FILE, Read, json_records, parsed_records, table_records

CAPTION_BYTES_A_TASK = 64 * 1024
"""Some hundreds of captions, so of pictures: a captions file alone is too small for Spark to spread its rows."""
MAX_TASKS = 10_000
COCO = (
    "images array<struct<id: string, file_name: string, height: int, width: int>>, "
    "annotations array<struct<id: string, image_id: string, caption: string>>"
)


def open_folder(
    spark: SparkSession, name: str, source: FolderSourceConfig, config: DataConfig, taken: pa.Table
) -> Source:
    """A record a row of the captions file, with its picture. Pictures that no row names are left alone.

    Items are rows of the captions file, and their states those of their pictures: a file to which rows were added, or a
    folder in which a picture changed, is read there alone.

    Raises:
        UserError: no such folder or captions file, not one of the three forms, or a column that is missing.
    """
    folder = plain_folder(config)
    file = _captions(folder / source.captions)
    captions, read = _records(spark, file, source, config)
    tasks = min(1 + file.size // CAPTION_BYTES_A_TASK, MAX_TASKS)
    column = source.columns.image
    states = partial(listed, read=read, captions=file.path, folder=str(folder), column=column)
    rows = captions.repartition(tasks).mapInArrow(states, from_arrow_schema(LISTED))
    items = rows.select(*ITEMS.names).toArrow().cast(ITEMS)
    fresh = fresh_of(items, taken)
    all_of_them = items.group_by(ITEMS.names).aggregate([])
    if 0 < len(fresh) < len(all_of_them):
        rows = rows.join(F.broadcast(spark.createDataFrame(fresh.select(["item"]))), "item", "left_semi")
    pictures = partial(
        with_pictures, read=listed_records, folder=str(folder), column=column, max_bytes=config.limits.max_bytes
    )
    ingest_id = short_hash(name, sorted(zip(*items.to_pydict().values(), strict=True)))
    return Source(Rows(rows, pictures) if len(fresh) else None, ingest_id, fresh, len(all_of_them) - len(fresh))


def _captions(path: Path) -> SourceFile:
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(
            "the captions file cannot be read",
            where=str(path),
            got=str(error.strerror),
            fix="--set data.source.path=FOLDER and --set data.source.captions=FILE, relative to the folder",
        ) from None
    return SourceFile(str(path), path.name, found.st_size, found.st_mtime_ns // 1000)


def _records(
    spark: SparkSession, file: SourceFile, source: FolderSourceConfig, config: DataConfig
) -> tuple[DataFrame, Read]:
    name = file.name.lower()
    if name.endswith(csv.SUFFIXES):
        header = csv.header_of(spark, file, multiline=True)
        demand_columns(config, header, file.path)
        return csv.parsed(spark, [file.path], header, multiline=True), parsed_records
    if name.endswith(jsonl.SUFFIXES):
        rows = text_of(spark, [file.path])
        demand_columns(config, jsonl.keys_of(rows), file.path)
        return rows, json_records
    if name.endswith(".json"):
        rows = _coco(spark, file, source)
        demand_columns(config, rows.columns[1:], file.path)
        return rows, partial(table_records, image=source.columns.image)
    raise UserError(
        "the captions file has no known form",
        where=file.path,
        got=f"a file called {file.name}",
        fix="expected CSV (.csv), JSON lines (.jsonl) or COCO captions (.json)",
    )


def _coco(spark: SparkSession, file: SourceFile, source: FolderSourceConfig) -> DataFrame:
    """A row an image, with the captions of its annotations as a list; an annotation without an image is one too."""
    document = spark.read.schema(COCO).json(file.path, multiLine=True)
    parts = document.selectExpr("images IS NOT NULL AND annotations IS NOT NULL AS coco").collect()
    if not (len(parts) == 1 and parts[0]["coco"]):
        raise UserError(
            "the captions file is not COCO captions JSON",
            where=file.path,
            got="a file without lists called images and annotations",
            fix="expected one object with images (id, file_name) and annotations (image_id, caption)",
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

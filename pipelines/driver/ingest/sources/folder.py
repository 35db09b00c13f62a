"""Folder sources: a folder of picture files, and a captions file whose rows refer to the picture files.

The captions file is CSV, JSON lines or COCO captions JSON. The driver reads COCO captions JSON, and executors read CSV
and JSON lines. Executors open the pictures, so every executor must see the folder.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from pipelines.config import CsvSourceConfig, DataConfig, FolderSourceConfig, short_hash
from pipelines.driver.ingest.ledger import ITEMS, pending_items
from pipelines.driver.ingest.sources import csv, jsonl
from pipelines.driver.ingest.sources.files import SourceFile, source_folder
from pipelines.driver.ingest.sources.lines import COMPRESSION_SUFFIXES, read_layouts, split_files
from pipelines.driver.ingest.sources.source import Source, SourceRows, require_columns
from pipelines.driver.ingest.sources.walk import PassedOver, file_reason, folder_reason
from pipelines.errors import UserError
from pipelines.executor.ingest.records.coco import coco_columns, coco_records
from pipelines.executor.ingest.records.csv import csv_records
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
from pipelines.executor.ingest.records.jsonl import jsonl_records
from pipelines.executor.ingest.records.lines import RANGE, line_limit
from pipelines.executor.ingest.records.record import Read
from pipelines.executor.ingest.storage import describe_damage, printable

CAPTION_BYTES_PER_TASK = 64 * 1024
"""Number of bytes of the captions file (a few hundred captions) for which one Spark task looks up the pictures."""
MAX_TASKS = 10_000
SMALL_CAPTIONS_BYTES = 8 * 2**20
"""Size in bytes up to which a captions file is read in one process, because starting Spark would take longer."""
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif")
COCO_SUFFIXES = tuple(f".json{compression}" for compression in COMPRESSION_SUFFIXES)


def open_folder(
    spark: SparkSession, name: str, source: FolderSourceConfig, config: DataConfig, ingested: pa.Table
) -> Source:
    """Open a folder. Each row of the captions file is one record. Pictures to which no row refers are passed over.

    In the ledger, an item is a row of the captions file, and the state of the item is the change token of its picture.
    Only new rows, and rows whose picture has changed, are read.

    Raises:
        UserError: the captions file does not exist, has an unknown format, or lacks a column.
    """
    folder = source_folder(config)
    file = _captions_file(folder / source.captions)
    captions = _load_captions(spark, file, source, config)
    tasks = min(1 + file.size // CAPTION_BYTES_PER_TASK, MAX_TASKS)
    column = source.columns.image
    list_rows = partial(list_captions, read=caption_records, captions=file.path, folder=str(folder), column=column)
    rows = _divide(captions, tasks).mapInArrow(list_rows, from_arrow_schema(CAPTIONS))
    opened = _open_listed(name, folder, file, rows.select(*ITEMS.names, "picture").toArrow(), ingested)
    if opened.unchanged and len(opened.pending):
        rows = rows.join(F.broadcast(spark.createDataFrame(opened.pending.select(["item"]))), "item", "left_semi")
    # All rows of a picture go to one task, one after another, so that the picture is read and decoded once. The sort
    # keeps the order in which the rows were listed.
    rows = rows.withColumn("position", F.monotonically_increasing_id())
    rows = rows.repartition(tasks, F.coalesce("picture", "item")).sortWithinPartitions("picture", "position")
    parse = partial(
        folder_records,
        read=caption_records,
        folder=str(folder),
        column=column,
        max_bytes=config.limits.max_bytes,
        subfolder=subfolder_of(file.path, str(folder)),
    )
    return replace(opened, rows=SourceRows(rows, parse)) if len(opened.pending) else opened


def check_captions(source: FolderSourceConfig, config: DataConfig) -> None:
    """Check that the captions file exists and has a known format, and that a CSV file has the configured columns.

    Raises:
        UserError: the captions file does not exist, has an unknown format, or is a CSV file that lacks a column.
    """
    file = _captions_file(source_folder(config) / source.captions)
    if _format(file) == "csv":
        csv.csv_layouts(config, [file], file.path, CsvSourceConfig(multiline=True))


def open_small_folder(name: str, source: FolderSourceConfig, config: DataConfig, ingested: pa.Table) -> Source | None:
    """If the captions file is small, open the folder without Spark and find the pending rows, else return None.

    Raises:
        UserError: the captions file does not exist, has an unknown format, or lacks a column.
    """
    folder = source_folder(config)
    file = _captions_file(folder / source.captions)
    if file.size > SMALL_CAPTIONS_BYTES:
        return None
    batches = _parse_captions(file, source, config)
    listed = list_captions(
        batches, read=caption_records, captions=file.path, folder=str(folder), column=source.columns.image
    )
    rows = pa.Table.from_batches(listed, CAPTIONS).select([*ITEMS.names, "picture"])
    return _open_listed(name, folder, file, rows, ingested)


def _open_listed(name: str, folder: Path, file: SourceFile, listed: pa.Table, ingested: pa.Table) -> Source:
    """Return the opened source, but without its rows.

    `listed` has the item (ledger.ITEMS) and the picture of each row of the captions file.
    """
    items = listed.select(ITEMS.names).cast(ITEMS)
    pending = pending_items(items, ingested)
    distinct = items.group_by(ITEMS.names).aggregate([])
    used = {*listed["picture"].to_pylist(), os.path.realpath(file.path)}
    return Source(
        None,
        short_hash(name, sorted(zip(*items.to_pydict().values(), strict=True))),
        pending,
        len(distinct) - len(pending),
        passed_over=passed_over(os.path.realpath(folder), used),
    )


def passed_over(folder: str, used: Collection[str | None]) -> tuple[PassedOver, ...]:
    """Return the files and folders that are not read, including the pictures to which no row refers.

    Links to folders are not followed, because a link may lead to all files of the machine.

    Args:
        folder: path of the folder, with all links resolved.
        used: paths of the captions file and of the pictures to which rows refer, with all links resolved.
    """
    found: list[PassedOver] = []

    def pass_over(path: Path, reason: str, end: str = "") -> None:
        found.append(PassedOver(printable(str(path.relative_to(folder)) + end), reason))

    for top, folders, files in os.walk(folder, onerror=lambda error: pass_over(Path(error.filename), "no_access", "/")):
        for name in sorted(folders):
            path = Path(top, name)
            if reason := _leads_out(path, folder) or folder_reason(name):
                pass_over(path, reason, "/")
                folders.remove(name)
        for name in sorted(files):
            path = Path(top, name)
            if printable(str(path)) not in used and printable(os.path.realpath(path)) not in used:
                pass_over(path, _leads_out(path, folder) or _file_reason(path))
    return tuple(found)


def _leads_out(path: Path, folder: str) -> str | None:
    is_outside = path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(folder)
    return "link_outside" if is_outside else None


def _file_reason(path: Path) -> str:
    if not path.is_file():
        return "not_regular"
    is_picture = path.name.lower().endswith(PICTURE_SUFFIXES)
    return file_reason(path.name) or ("not_named" if is_picture else "other_kind")


def _captions_file(path: Path) -> SourceFile:
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(
            "the captions file cannot be read",
            where=str(path),
            got=str(error.strerror),
            fix="set data.source.path to a folder, and data.source.captions to a file path relative to this folder",
        ) from None
    modified = found.st_mtime_ns // 1000
    return SourceFile(str(path), path.name, found.st_size, modified, str(path), True, {})


def _divide(captions: DataFrame, tasks: int) -> DataFrame:
    """Give each task consecutive records of the captions file, so that the texts of a picture keep their order."""
    if tasks == 1:
        return captions.coalesce(1)
    numbered = captions.withColumn("position", F.monotonically_increasing_id())
    return numbered.repartitionByRange(tasks, "position").sortWithinPartitions("position").drop("position")


def _load_captions(spark: SparkSession, file: SourceFile, source: FolderSourceConfig, config: DataConfig) -> DataFrame:
    """Return the records of the captions file in the schema RECORDS."""
    match _format(file):
        case "csv":
            rows = csv.load_rows(spark, CsvSourceConfig(multiline=True), config, [file])
        case "jsonl":
            rows = jsonl.load_rows(spark, config, [file])
        case _:
            return spark.createDataFrame(_read_coco(file, source, config))
    return rows.frame.mapInArrow(partial(parse_captions, read=rows.read), from_arrow_schema(RECORDS))


def _parse_captions(file: SourceFile, source: FolderSourceConfig, config: DataConfig) -> Iterator[pa.RecordBatch]:
    """Without Spark, return the records of the captions file in the schema RECORDS."""
    limit = line_limit(config.limits)
    match _format(file):
        case "csv":
            layouts = csv.csv_layouts(config, [file], file.path, dialect := CsvSourceConfig(multiline=True))
            read: Read = partial(csv_records, layouts=tuple(layouts), multiline=dialect.multiline, limit=limit)
        case "jsonl":
            layouts = read_layouts([file], lambda _, layout: layout)
            read = partial(jsonl_records, layouts=tuple(layouts), limit=limit)
        case _:
            return iter(_read_coco(file, source, config).to_batches())
    ranges = [dict(zip(RANGE.names, row, strict=True)) for row in split_files([file], layouts, layouts, file.size)]
    return parse_captions(iter([pa.RecordBatch.from_pylist(ranges, RANGE)]), read=read)


def _format(file: SourceFile) -> Literal["csv", "jsonl", "coco"]:
    name = file.name.lower()
    if name.endswith(csv.SUFFIXES):
        return "csv"
    if name.endswith(jsonl.SUFFIXES):
        return "jsonl"
    if name.endswith(COCO_SUFFIXES):
        return "coco"
    raise UserError(
        "the captions file has an unknown format",
        where=file.path,
        got=f"a file named {file.name}",
        fix="expected CSV (.csv, .tsv), JSON lines (.jsonl) or COCO captions (.json)",
    )


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

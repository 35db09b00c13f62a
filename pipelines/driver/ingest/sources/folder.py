"""Folder sources: a folder of picture files, and a captions file whose rows refer to the picture files.

The captions file is CSV, JSON lines or COCO captions JSON. The driver reads COCO captions JSON, and executors read CSV
and JSON lines. If the captions file is small, the driver reads the file, whatever its format, to find out whether Spark
is needed (`open_small_folder`). Executors open the pictures, so every executor must see the folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from pipelines.config import CsvSourceConfig, DataConfig, FolderSourceConfig, short_hash
from pipelines.driver.delta.settings import FEW_ROWS, escape_wildcards
from pipelines.driver.ingest.ledger import ITEMS, Ledger, pending_items
from pipelines.driver.ingest.sources import csv, jsonl
from pipelines.driver.ingest.sources.files import SourceFile, source_folder
from pipelines.driver.ingest.sources.lines import COMPRESSION_SUFFIXES, read_layouts, split_files
from pipelines.driver.ingest.sources.source import Source, SourceRows, require_columns
from pipelines.driver.ingest.sources.walk import NAMED_FILES, PassedOver, passed_over, walk_entries
from pipelines.driver.ingest.spill import SpillFolder
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
from pipelines.executor.ingest.storage import FILE_ERRORS, describe_damage, printable, require_damage
from pipelines.executor.ingest.text_stream import open_text

CAPTION_BYTES_PER_TASK = 64 * 1024
"""Number of bytes of the captions file (a few hundred captions) for which one Spark task looks up the pictures."""
ROWS_PER_TASK = 100
"""Largest number of pending rows for which one Spark task reads the pictures."""
MAX_TASKS = 10_000
SMALL_CAPTIONS_BYTES = 8 * 2**20
"""Largest uncompressed size, in bytes, of a captions file that is read in one process without Spark. Starting Spark
would take longer."""
ENTRIES = pa.schema([("path", pa.string()), ("relative", pa.string()), ("reason", pa.string())])
"""Schema of the entries of a folder, from `walk_entries`."""
ENTRY_ROWS = 10_000
"""Number of entries of a folder that are written at once."""
COCO_SUFFIXES = tuple(f".json{compression}" for compression in COMPRESSION_SUFFIXES)


def open_folder(
    spark: SparkSession,
    name: str,
    source: FolderSourceConfig,
    config: DataConfig,
    ingested: pa.Table | Ledger,
    *,
    spill: SpillFolder | None,
) -> Source:
    """Open a folder. Each row of the captions file is one record. Pictures to which no row refers are passed over.

    In the ledger, an item is a row of the captions file, and the state of the item is the change token of its picture.
    Executors read the pictures of new rows, and the pictures that have changed.

    If the captions file is large, its rows are written to the folder `spill` and compared with the ledger by Spark, so
    the memory of the driver does not depend on the number of rows.

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
    # The position keeps the order in which the rows were listed.
    rows = rows.withColumn("position", F.monotonically_increasing_id())
    if spill is None or _is_small(file):
        known = ingested.read() if isinstance(ingested, Ledger) else ingested
        opened = _open_listed(name, folder, file, rows.select(*ITEMS.names, "picture").toArrow(), known)
        pending = spark.createDataFrame(opened.pending)
    else:
        rows = spill.materialize(rows, "captions")
        known = ingested.rows() if isinstance(ingested, Ledger) else spark.createDataFrame(ingested)
        opened = _open_large(name, folder, file, rows, known, spill=spill)
        pending = opened.pending
    if opened.unchanged and opened.num_pending:
        ids = pending.select("item")
        few = opened.num_pending <= FEW_ROWS
        rows = rows.join(F.broadcast(ids) if few else ids, "item", "left_semi")
    tasks = min(tasks, 1 + opened.num_pending // ROWS_PER_TASK)
    # All rows of a picture go to one task, one after another, so that the picture is read and decoded once.
    rows = rows.repartition(tasks, F.coalesce("picture", "item")).sortWithinPartitions("picture", "position")
    parse = partial(
        folder_records,
        read=caption_records,
        folder=str(folder),
        column=column,
        max_bytes=config.limits.max_bytes,
        subfolder=subfolder_of(file.path, str(folder)),
    )
    return replace(opened, rows=SourceRows(rows, parse)) if opened.num_pending else opened


def check_captions(source: FolderSourceConfig, config: DataConfig) -> None:
    """Check that the captions file exists and has a known format, and that a CSV file has the configured columns.

    Raises:
        UserError: the captions file does not exist, has an unknown format, or is a CSV file that lacks a column.
    """
    file = _captions_file(source_folder(config) / source.captions)
    if _format(file) == "csv":
        csv.csv_layouts(config, [file], file.path, CsvSourceConfig(multiline=True))


def has_small_captions(source: FolderSourceConfig, config: DataConfig) -> bool:
    """Return whether the captions file is small enough for `open_small_folder`.

    Raises:
        UserError: the captions file does not exist.
    """
    return _is_small(_captions_file(source_folder(config) / source.captions))


def _is_small(file: SourceFile) -> bool:
    """Return whether a captions file has at most SMALL_CAPTIONS_BYTES bytes after decompression."""
    if file.size > SMALL_CAPTIONS_BYTES:
        return False
    unread = SMALL_CAPTIONS_BYTES + 1
    try:
        with closing(open_text(file.path)) as text:
            while unread and (piece := text.read(min(unread, 2**20))):
                unread -= len(piece)
    except FILE_ERRORS as error:
        require_damage(error)  # the reader of the rows reports the damage
    return unread > 0


def open_small_folder(name: str, source: FolderSourceConfig, config: DataConfig, ingested: pa.Table) -> Source:
    """Without Spark, open a folder whose captions file is small, and find the pending rows.

    Raises:
        UserError: the captions file does not exist, has an unknown format, or lacks a column.
    """
    folder = source_folder(config)
    file = _captions_file(folder / source.captions)
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
    used = {*listed["picture"].to_pylist(), printable(os.path.realpath(file.path))}
    named, counts = passed_over(os.path.realpath(folder), used)
    return Source(
        None,
        short_hash(name, sorted(zip(*items.to_pydict().values(), strict=True))),
        pending,
        len(distinct) - len(pending),
        passed_over=named,
        passed_over_count=counts,
    )


def _open_large(
    name: str, folder: Path, file: SourceFile, rows: DataFrame, known: DataFrame, *, spill: SpillFolder
) -> Source:
    """Return the same as `_open_listed`, but hold no rows and no names of pictures in the memory of the driver.

    Args:
        name: name of the source, which is the name of its data config.
        folder: folder of the pictures.
        file: captions file.
        rows: rows of the captions file, with the item (ledger.ITEMS) and the picture of each row.
        known: items that need not be read again.
        spill: folder for intermediate results.
    """
    both = rows.select(*ITEMS.names, F.lit(True).alias("listed"))
    both = both.unionAll(known.select(*ITEMS.names, F.lit(False).alias("listed")))
    items = both.groupBy(*ITEMS.names).agg(F.bool_or("listed").alias("listed"), F.bool_and("listed").alias("is_new"))
    items = spill.materialize(items.filter("listed").select(*ITEMS.names, "is_new"), "items")
    number = F.xxhash64(*ITEMS.names)
    totals = items.agg(
        F.count("*").alias("listed"),
        F.count_if("is_new").alias("pending"),
        F.coalesce(F.sum(number.cast("decimal(20, 0)")).cast("string"), F.lit("")).alias("sum"),
        F.bit_xor(number).alias("xor"),
    ).collect()[0]
    walked = spill.folder / "entries.parquet"
    _write_entries(walked, os.path.realpath(folder), printable(os.path.realpath(file.path)))
    entries = rows.sparkSession.read.schema(from_arrow_schema(ENTRIES)).parquet(escape_wildcards(str(walked)))
    used = rows.select(F.col("picture").alias("path")).filter("path IS NOT NULL").distinct()
    unread = spill.materialize(entries.join(used, "path", "left_anti").select("relative", "reason"), "unread")
    counts = {row["reason"]: row["count"] for row in unread.groupBy("reason").count().orderBy("reason").collect()}
    named = unread.orderBy("relative").limit(NAMED_FILES).collect()
    return Source(
        None,
        short_hash(name, totals["listed"], totals["sum"], totals["xor"]),
        items.filter("is_new").select(*ITEMS.names),
        totals["listed"] - totals["pending"],
        passed_over=tuple(PassedOver(row["relative"], row["reason"]) for row in named),
        passed_over_count=counts,
        counted=totals["pending"],
    )


def _write_entries(path: Path, folder: str, captions: str) -> None:
    """Write a Parquet file in the schema ENTRIES that lists the entries of a folder that no row may name."""
    entries = walk_entries(folder)
    with pq.ParquetWriter(path, ENTRIES) as writer:
        while batch := list(islice(entries, ENTRY_ROWS)):
            rows = [{"path": key} | entry._asdict() for key, entry in batch if key != captions]
            writer.write_table(pa.Table.from_pylist(rows, ENTRIES))


def _captions_file(path: Path) -> SourceFile:
    try:
        with path.open("rb") as opened:
            found = os.fstat(opened.fileno())
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

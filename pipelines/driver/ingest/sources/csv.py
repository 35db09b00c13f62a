"""CSV: base64 pictures in files with a header."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StringType, StructField, StructType

from pipelines.config import CsvSourceConfig, DataConfig
from pipelines.driver.ingest.sources.files import PACKED, Rows, SourceFile, demand_columns, lines_of
from pipelines.errors import UserError
from pipelines.executor.ingest.records import csv_records, parsed_records

SUFFIXES = tuple(f".csv{packed}" for packed in PACKED)
CORRUPT = "_lakesight_corrupt_record"


def rows(spark: SparkSession, source: CsvSourceConfig, config: DataConfig, files: Sequence[SourceFile]) -> Rows:
    """All records of the files. Each header is read for itself: Spark would take the first file's for all of them.

    Raises:
        UserError: an empty file, or a column that is missing.
    """
    by_header: dict[tuple[str, ...], list[SourceFile]] = {}
    for file in files:
        header = header_of(spark, file, multiline=source.multiline)
        demand_columns(config, header, file.path)
        by_header.setdefault(header, []).append(file)
    if source.multiline:
        frames = [parsed(spark, [f.path for f in of_it], header, multiline=True) for header, of_it in by_header.items()]
        return Rows(reduce(DataFrame.unionAll, frames), parsed_records)
    numbered = [(file, number) for number, of_it in enumerate(by_header.values()) for file in of_it]
    frame, lines = lines_of(spark, numbered)
    return Rows(frame, partial(csv_records, headers=tuple(by_header), lines=lines))


def header_of(spark: SparkSession, file: SourceFile, *, multiline: bool) -> tuple[str, ...]:
    """Column names of a file.

    Raises:
        UserError: the file is empty.
    """
    header = tuple(spark.read.csv(file.path, header=True, **_dialect(multiline)).columns)  # type: ignore[arg-type]
    if not header:
        raise UserError("the input file is empty", where=file.path, got=f"{file.size} bytes", fix="expected a header")
    return header


def parsed(spark: SparkSession, paths: list[str], header: tuple[str, ...], *, multiline: bool) -> DataFrame:
    """Rows for `parsed_records`, taken apart by Spark."""
    schema = StructType([StructField(name, StringType()) for name in (*header, CORRUPT)])
    frame = spark.read.csv(
        paths,
        schema=schema,
        header=True,
        mode="PERMISSIVE",
        columnNameOfCorruptRecord=CORRUPT,
        **_dialect(multiline),  # type: ignore[arg-type]
    )
    record = F.create_map(*(part for name in header for part in (F.lit(name), F.col(f"`{name.replace('`', '``')}`"))))
    return frame.select(F.col("_metadata.file_name").alias("file"), F.col(CORRUPT).alias("raw"), record.alias("row"))


def _dialect(multiline: bool) -> dict[str, str | int | bool]:
    """RFC 4180: a quote inside quotes is doubled. Fields have no greatest length: pictures are in them."""
    return {"quote": '"', "escape": '"', "multiLine": multiline, "maxCharsPerColumn": -1}

"""CSV sources: files with a header and base64 pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StringType, StructField, StructType

from pipelines.config import CsvSourceConfig, DataConfig
from pipelines.driver.ingest.sources.files import COMPRESSION_SUFFIXES, SourceFile, load_lines, spark_literal
from pipelines.driver.ingest.sources.source import SourceRows, require_columns
from pipelines.errors import UserError
from pipelines.executor.ingest.records.csv import csv_records, spark_csv_records

SUFFIXES = tuple(f".csv{compression}" for compression in COMPRESSION_SUFFIXES)
CORRUPT = "_lakesight_corrupt_record"


def load_rows(
    spark: SparkSession, source: CsvSourceConfig, config: DataConfig, files: Sequence[SourceFile]
) -> SourceRows:
    """Load the rows of the files. Each file is read with its own header, because Spark uses one header for all files.

    Raises:
        UserError: a file is empty or lacks a column.
    """
    by_header: dict[tuple[str, ...], list[SourceFile]] = {}
    for file in files:
        header = read_header(spark, file, multiline=source.multiline)
        require_columns(config, header, file.path)
        by_header.setdefault(header, []).append(file)
    if source.multiline:
        frames = [parse(spark, [f.path for f in group], header, multiline=True) for header, group in by_header.items()]
        return SourceRows(reduce(DataFrame.unionAll, frames), spark_csv_records)
    indexed = [(file, index) for index, group in enumerate(by_header.values()) for file in group]
    frame, lines = load_lines(spark, indexed)
    return SourceRows(frame, partial(csv_records, headers=tuple(by_header), lines=lines))


def read_header(spark: SparkSession, file: SourceFile, *, multiline: bool) -> tuple[str, ...]:
    """Read the column names of a file.

    Raises:
        UserError: the file is empty.
    """
    header = tuple(spark.read.csv(spark_literal(file.path), header=True, **_dialect(multiline)).columns)  # type: ignore[arg-type]
    if not header:
        raise UserError("the input file is empty", where=file.path, got=f"{file.size} bytes", fix="expected a header")
    return header


def parse(spark: SparkSession, paths: list[str], header: tuple[str, ...], *, multiline: bool) -> DataFrame:
    """Parse CSV files in Spark, and return rows in the format that `spark_csv_records` expects."""
    schema = StructType([StructField(name, StringType()) for name in (*header, CORRUPT)])
    frame = spark.read.csv(
        [spark_literal(path) for path in paths],
        schema=schema,
        header=True,
        mode="PERMISSIVE",
        columnNameOfCorruptRecord=CORRUPT,
        **_dialect(multiline),  # type: ignore[arg-type]
    )
    record = F.create_map(*(part for name in header for part in (F.lit(name), F.col(f"`{name.replace('`', '``')}`"))))
    return frame.select(F.col("_metadata.file_name").alias("file"), F.col(CORRUPT).alias("raw"), record.alias("row"))


def _dialect(multiline: bool) -> dict[str, str | int | bool]:
    """Return Spark's CSV options for RFC 4180, in which a quote inside quotes is doubled and fields have any length."""
    return {"quote": '"', "escape": '"', "multiLine": multiline, "maxCharsPerColumn": -1}

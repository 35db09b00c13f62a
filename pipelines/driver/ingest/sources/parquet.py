"""Parquet sources: files with pictures as binary, as base64 text, or as Hugging Face's struct of bytes and path."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.config import DataConfig, ParquetSourceConfig
from pipelines.driver.ingest.sources.files import SourceFile, spark_literal
from pipelines.driver.ingest.sources.source import SourceRows, require_columns
from pipelines.errors import UserError
from pipelines.executor.ingest.records.table import FILE, table_records

SUFFIXES = (".parquet",)


def load_rows(
    spark: SparkSession, source: ParquetSourceConfig, config: DataConfig, files: Sequence[SourceFile]
) -> SourceRows:
    """Load the rows of the files. Files may have different columns, but equal columns must have the same type.

    Raises:
        UserError: a column has different types in different files, or a column is missing.
    """
    try:
        frame = spark.read.option("mergeSchema", True).parquet(*(spark_literal(file.path) for file in files))
    except AnalysisException as error:
        got = str(error).partition("\n")[0]
        raise UserError(
            "the files cannot be read as one table",
            where=source.path,
            got=got[:500],
            fix="ingest files with different schemas separately",
        ) from None
    require_columns(config, frame.columns, source.path)
    with_file = prepend_file(frame, F.col("_metadata.file_name"))
    return SourceRows(with_file, partial(table_records, image=source.columns.image))


def prepend_file(frame: DataFrame, file: Column) -> DataFrame:
    """Put a column with the file name before all other columns, as `table_records` expects."""
    return frame.select(file.alias(FILE), *(F.col(f"`{name.replace('`', '``')}`") for name in frame.columns))

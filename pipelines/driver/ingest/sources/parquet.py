"""Parquet: pictures binary, base64, or in Hugging Face's struct of bytes and path."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.config import DataConfig, ParquetSourceConfig
from pipelines.driver.ingest.sources.files import Rows, SourceFile, demand_columns
from pipelines.errors import UserError
from pipelines.executor.ingest.records import FILE, table_records

SUFFIXES = (".parquet",)


def rows(spark: SparkSession, source: ParquetSourceConfig, config: DataConfig, files: Sequence[SourceFile]) -> Rows:
    """All rows of the files. Files may have more columns than others, but not other types.

    Raises:
        UserError: files that do not go together, or a column that is missing.
    """
    try:
        frame = spark.read.option("mergeSchema", True).parquet(*(file.path for file in files))
    except AnalysisException as error:
        got = str(error).partition("\n")[0]
        raise UserError(
            "the files cannot be read as one table", where=source.path, got=got[:500], fix="ingest them apart"
        ) from None
    demand_columns(config, frame.columns, source.path)
    named = columns_for_table_records(frame, F.col("_metadata.file_name"))
    return Rows(named, partial(table_records, image=source.columns.image))


def columns_for_table_records(frame: DataFrame, file: Column) -> DataFrame:
    """Rows for `table_records`: what to call the file, then every column."""
    return frame.select(file.alias(FILE), *(F.col(f"`{name.replace('`', '``')}`") for name in frame.columns))

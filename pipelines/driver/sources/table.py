"""A Delta table, by name or by path, read at one version from beginning to end."""

from __future__ import annotations

from functools import partial

from pyspark.errors import AnalysisException
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from pipelines.config import DataConfig, TableSourceConfig, short_hash
from pipelines.driver.sources.files import Source, absolute, demand_columns
from pipelines.driver.sources.parquet import columns_for_table_records
from pipelines.errors import UserError
from pipelines.executor.records import table_records


def open_table(spark: SparkSession, name: str, source: TableSourceConfig, config: DataConfig) -> Source:
    """All rows of a version: the one that is asked for, else the newest of now. Rows that later vanish from the table
    stay in `samples`.

    Raises:
        UserError: no table is named, there is none, it has no such version, or a column is missing.
    """
    if not source.where:
        fix = "--set data.source.table=CATALOG.SCHEMA.TABLE, or --set data.source.path=FOLDER"
        raise UserError("the run has no input", where="data.source.table", got="nothing", fix=fix)
    parts = source.table.split(".") if source.table else ("delta", absolute(source.path))
    quoted = ".".join(f"`{part.replace('`', '``')}`" for part in parts)
    try:
        newest = spark.sql(f"DESCRIBE HISTORY {quoted} LIMIT 1").collect()[0]["version"]
        identity = spark.sql(f"DESCRIBE DETAIL {quoted}").collect()[0]["id"]
        version = newest if source.version is None else source.version
        frame = spark.sql(f"SELECT * FROM {quoted} VERSION AS OF {version}")  # noqa: S608 (quoted)
    except AnalysisException as error:
        raise UserError(
            "the input is no Delta table that can be read",
            where=source.where,
            got=str(error).partition("\n")[0][:500],
            fix="name a Delta table and a version of it that is there: `DESCRIBE HISTORY` lists them",
        ) from None
    demand_columns(config, frame.columns, source.where)
    rows = columns_for_table_records(frame, F.lit(source.where.rstrip("/").rpartition("/")[2]))
    read = partial(table_records, image=source.columns.image)
    return Source(rows, read, short_hash(name, identity, version))

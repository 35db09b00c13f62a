"""Any Delta table with an id and a picture column, as rows to caption: pinned to a version, and checked."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import BinaryType, StringType

from pipelines.driver.delta.failures import filtered
from pipelines.errors import UserError
from pipelines.platform import Platform
from vlm.errors import did_you_mean

TABLE_NAME = re.compile(r"([A-Za-z_]\w*\.){0,2}[A-Za-z_]\w*|delta\.`[^`]+`")


@dataclass(frozen=True)
class Pictures:
    """Rows of a table at a version.

    Attributes:
        name: full name of the table.
        version: of the table.
        rows: columns image_id (string), image (binary, or base64 text) and file (name of the data file it lies in).
        ids: column image_id of the whole table, whatever condition `rows` has.
    """

    name: str
    version: int
    rows: DataFrame
    ids: DataFrame


def open_pictures(
    spark: SparkSession, platform: Platform, table: str, version: int | None, *, columns: tuple[str, str], where: str
) -> Pictures:
    """The rows that a request means.

    Args:
        spark: the session.
        platform: where a table without a schema is.
        table: its name.
        version: of it; None means the newest.
        columns: with ids, and with pictures.
        where: SQL condition; empty for all rows.

    Raises:
        UserError: no such table, version or column, no pictures in it, or a condition that is not SQL.
    """
    if not TABLE_NAME.fullmatch(table):
        raise UserError(
            "this is not a table name",
            where="the table to caption",
            got=table,
            fix="name it as table, schema.table, catalog.schema.table, or delta.`/path`",
        )
    name = table if "." in table else platform.table(table)
    pinned, frame = _read(spark, platform, name, version)
    identity_column, image = columns
    for column in columns:
        if column not in frame.columns:
            raise UserError(
                f"table {name} has no column {column!r}",
                where=f"version {pinned}",
                got=column,
                fix=f"choose one of {', '.join(frame.columns)}{did_you_mean(column, frame.columns)}",
            )
    kind = frame.schema[image].dataType
    if not isinstance(kind, BinaryType | StringType):
        raise UserError(
            f"column {image!r} of table {name} holds no pictures",
            where=f"version {pinned}",
            got=f"type {kind.simpleString()}",
            fix="name a binary column of picture files, or a string column of base64 text",
        )
    identity = frame[identity_column].cast("string").alias("image_id")
    file = F.col("_metadata.file_name").alias("file")
    rows = filtered(frame, where, where=f"table {name}").select(identity, frame[image].alias("image"), file)
    return Pictures(name, pinned, rows, frame.select(identity))


def files_at(spark: SparkSession, name: str, version: int) -> set[str]:
    """Names of a table's data files at a version; none where Delta has forgotten that version.

    Delta never changes a file: a row that lies in the same file at two versions is the same row.
    """
    try:
        found = spark.read.option("versionAsOf", version).table(name).inputFiles()
    except AnalysisException:
        return set()
    return {path.rpartition("/")[2] for path in found}


def _read(spark: SparkSession, platform: Platform, name: str, wanted: int | None) -> tuple[int, DataFrame]:
    """The table's version and rows: the version wanted, or the newest, pinned, so that a job sees one state."""
    try:
        newest = spark.sql(f"DESCRIBE HISTORY {name} LIMIT 1").head()
    except AnalysisException as error:
        own = platform.namespace
        shown = spark.sql(f"SHOW TABLES IN {own}").collect()
        tables = [f"{own}.{row['tableName']}" for row in shown if not row["isTemporary"]]
        raise UserError(
            "the table cannot be read as a Delta table",
            where=name,
            got=_first_line(error),
            fix=f"choose one of {', '.join(tables)}{did_you_mean(name, tables)}",
        ) from None
    assert newest is not None
    version = int(newest["version"]) if wanted is None else wanted
    try:
        return version, spark.read.option("versionAsOf", version).table(name)
    except AnalysisException as error:
        raise UserError(
            f"table {name} cannot be read at version {version}",
            where=name,
            got=_first_line(error),
            fix=f"the newest version is {newest['version']}; DESCRIBE HISTORY lists them",
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]

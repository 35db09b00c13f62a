"""Source table of a caption job: a Delta table with an id column and a picture column, read at one pinned version."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, BinaryType, DataType, StringType, StructType

from pipelines.config import short_hash
from pipelines.driver.delta.commits import RESTORE, history_id, read_commit_ids, with_time
from pipelines.driver.delta.spark_errors import filter_rows, retention_fix
from pipelines.driver.delta.versions import newest_version
from pipelines.errors import UserError
from pipelines.executor.ingest.values import CONTROL
from pipelines.platform import Platform, analysed, spark_errors
from vlm.errors import did_you_mean

TABLE_NAME = re.compile(r"([A-Za-z_]\w*\.){0,2}[A-Za-z_]\w*|delta\.`[^`]+`")

COLUMNS_CHANGED = rf"^({RESTORE.pattern}|(RENAME|DROP|REPLACE|CHANGE) COLUMNS?)$"
"""Pattern of the Delta operations that may change which data of a data file a column name stands for."""

ARROW_TYPES = {
    **dict.fromkeys(("string", "varchar", "char"), pa.string()),
    **{"binary": pa.binary(), "boolean": pa.bool_(), "byte": pa.int8(), "short": pa.int16(), "integer": pa.int32()},
    **{"long": pa.int64(), "float": pa.float32(), "double": pa.float64(), "date": pa.date32()},
    **{"timestamp": pa.timestamp("us", "UTC"), "timestamp_ntz": pa.timestamp("us")},
}
"""Dict from the name of a Spark type to the Arrow type. `_arrow_type` also converts arrays and structs."""


@dataclass(frozen=True)
class SourceTable:
    """The table to caption, read at one version.

    Attributes:
        name: full name of the table.
        version: version of the table that is read.
        commit: id of the commit that made this version, or None if Delta no longer keeps the commit.
        rows: rows that meet the SQL condition of the request, with the columns image_id (string), image (binary,
            base64 text, or a path) and source_file (identity of the data file and of the columns that are read).
        ids: DataFrame with the column image_id of all rows of the table.
        is_filtered: whether `rows` has only the rows that meet a condition.
    """

    name: str
    version: int
    commit: str | None
    rows: DataFrame
    ids: DataFrame
    is_filtered: bool


def open_source_table(
    spark: SparkSession,
    platform: Platform,
    table: str,
    version: int | None,
    *,
    columns: tuple[str, str],
    where: str,
    image_root: str | None = None,
) -> SourceTable:
    """Open the table to caption, and check its columns.

    Args:
        spark: Spark session.
        platform: platform whose schema holds the table if `table` is a name without a schema.
        table: name of the table to open.
        version: version at which the table is read, or None for the newest version.
        columns: names of the id column and of the picture column.
        where: SQL condition on the rows; an empty condition selects all rows.
        image_root: folder or URL of the pictures if the picture column holds their paths or URIs, or None if the column
            holds the pictures themselves.

    Raises:
        UserError: the name of the table is not valid, the table or a column does not exist, the version cannot be read,
            the type of the picture column cannot hold pictures or paths, or the condition is not valid SQL.
    """
    if not TABLE_NAME.fullmatch(table):
        raise UserError(
            "the name of the table to caption is not valid",
            where="--table",
            got=table,
            fix="write the name as table, schema.table, catalog.schema.table, or delta.`/path`",
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
    has_paths = image_root is not None
    kind = frame.schema[image].dataType
    if not isinstance(kind, StringType if has_paths else BinaryType | StringType):
        expected = "a string column of paths or URIs" if has_paths else "a binary column of picture files"
        raise UserError(
            f"column {image!r} of table {name} holds no pictures",
            where=f"version {pinned}",
            got=f"type {kind.simpleString()}",
            fix=f"choose {expected}" + ("" if has_paths else ", or a string column of base64 text"),
        )
    identity = _id_text(frame, identity_column).alias("image_id")
    file = _source_file(spark, name, pinned, (*columns, image_root)).alias("source_file")
    rows = filter_rows(frame, where, where=f"table {name}").select(identity, frame[image].alias("image"), file)
    commit = read_commit_ids(spark, name, platform.table_location(name), [pinned]).get(pinned)
    return SourceTable(name, pinned, commit, rows, frame.select(identity), bool(where))


def _id_text(frame: DataFrame, name: str) -> Column:
    """Return ids as texts. Binary ids that are not texts, such as UUIDs, become hexadecimal digits, as in ingest."""
    text = frame[name].cast("string")
    if not isinstance(frame.schema[name].dataType, BinaryType):
        return text
    is_text = F.is_valid_utf8(text) & ~text.rlike(CONTROL.pattern)
    return F.when(is_text, text).otherwise(F.lower(F.hex(frame[name])))


def arrow_columns(schema: StructType) -> pa.Schema:
    """Return the columns of a table with their Arrow types.

    A Spark type that `_arrow_type` does not know, such as a decimal or a map, becomes Arrow's null type.
    """
    return pa.schema([(field.name, _arrow_type(field.dataType)) for field in schema.fields])


def _arrow_type(kind: DataType) -> pa.DataType:
    if isinstance(kind, ArrayType):
        return pa.list_(_arrow_type(kind.elementType))
    if isinstance(kind, StructType):
        return pa.struct(list(arrow_columns(kind)))
    return ARROW_TYPES.get(kind.typeName(), pa.null())


def _source_file(spark: SparkSession, name: str, version: int, columns: Sequence[str | None]) -> Column:
    """Return a column with the identity of the data file and of the columns from which a row is read.

    Delta never changes a data file, so a row with an equal identity has an equal value in the picture column. The
    identity contains no version number, so a row in an old data file keeps its identity, however often the table
    changes. RESTORE may bring back an older picture of a row, and a table may be written anew. In both cases, the row
    is in a different data file than the captioned picture, and therefore has a different identity.

    Args:
        spark: Spark session.
        name: name of the table in SQL.
        version: version at which the table is read.
        columns: id column, picture column, and root of the pictures or None.
    """
    read = hash_columns(columns, _newest_change_of_columns(spark, name, version))
    time = F.expr("unix_micros(_metadata.file_modification_time)")
    return F.concat_ws(" ", F.col("_metadata.file_name"), F.col("_metadata.file_size"), time, F.lit(read))


def hash_columns(columns: Sequence[str | None], change: str | None) -> str:
    """Return the hash of the columns from which a picture is read. The hash is the last part of `source_file`.

    Args:
        columns: id column, picture column, and root of the pictures or None.
        change: id of the newest commit that may have changed which data a column name stands for, or None.
    """
    return short_hash(tuple(columns), change)


def _newest_change_of_columns(spark: SparkSession, name: str, version: int) -> str | None:
    """Return the id of the newest commit that may have changed which data a column name stands for.

    If there is no such commit, return None.

    Only a table with column mapping can have such commits, for example RENAME COLUMN. For a table without column
    mapping, the history is not read. When Delta removes the commit from the history, the result changes. The next
    caption job then reads all pictures once and compares them with the captioned pictures.
    """
    properties = {row["key"]: row["value"] for row in spark.sql(f"SHOW TBLPROPERTIES {name}").collect()}
    if properties.get("delta.columnMapping.mode", "none") == "none":
        return None
    history = with_time(spark.sql(f"DESCRIBE HISTORY {name}")).filter(f"version <= {version}")
    changes = history.filter(F.col("operation").rlike(COLUMNS_CHANGED)).orderBy(F.desc("version")).limit(1)
    return next((history_id(row.asDict()) for row in changes.collect()), None)


def _read(spark: SparkSession, platform: Platform, name: str, version: int | None) -> tuple[int, DataFrame]:
    """Read the table at a version, or at the newest version if `version` is None. Return the version and the rows."""
    try:
        newest = newest_version(spark, name, platform.table_location(name))
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
    pinned = newest if version is None else version
    try:
        return pinned, analysed(spark.read.option("versionAsOf", pinned).table(name))
    except spark_errors() as error:
        fix = retention_fix(error)
        if fix is None and not isinstance(error, AnalysisException):
            raise
        raise UserError(
            f"table {name} cannot be read at version {pinned}",
            where=name,
            got=_first_line(error),
            fix=fix or f"choose a version that DESCRIBE HISTORY lists; the newest is {newest}",
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]

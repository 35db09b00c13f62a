"""Source table of a caption job: a Delta table with an id column and a picture column, read at one pinned version."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, BinaryType, DataType, StringType, StructType

from pipelines.driver.delta.commits import read_commit_ids
from pipelines.driver.delta.spark_errors import filter_rows
from pipelines.driver.delta.versions import newest_version
from pipelines.errors import UserError
from pipelines.platform import Platform, analysed
from vlm.errors import did_you_mean

TABLE_NAME = re.compile(r"([A-Za-z_]\w*\.){0,2}[A-Za-z_]\w*|delta\.`[^`]+`")

MAX_COMPARED_VERSIONS = 32
"""Largest number of earlier table versions whose data files one caption job lists."""

ARROW_TYPES = {
    **dict.fromkeys(("string", "varchar", "char"), pa.string()),
    **{"binary": pa.binary(), "boolean": pa.bool_(), "byte": pa.int8(), "short": pa.int16(), "integer": pa.int32()},
    **{"long": pa.int64(), "float": pa.float32(), "double": pa.float64(), "date": pa.date32()},
    **{"timestamp": pa.timestamp("us", "UTC"), "timestamp_ntz": pa.timestamp("us")},
}
"""Arrow type for each name of a Spark type."""


@dataclass(frozen=True)
class SourceTable:
    """The table to caption, read at one version.

    Attributes:
        name: full name of the table.
        location: folder or URL of the table, or None if a catalog manages the table.
        version: version of the table that is read.
        commit: id of the commit that made this version, or None if Delta no longer keeps the commit.
        rows: rows that meet the SQL condition of the request, with the columns image_id (string), image (binary,
            base64 text, or a path) and file (name of the data file that contains the row).
        ids: DataFrame with the column image_id of all rows of the table.
    """

    name: str
    location: str | None
    version: int
    commit: str | None
    rows: DataFrame
    ids: DataFrame


def open_source_table(
    spark: SparkSession,
    platform: Platform,
    table: str,
    version: int | None,
    *,
    columns: tuple[str, str],
    where: str,
    has_paths: bool = False,
) -> SourceTable:
    """Open the table that a request names, and check its columns.

    Args:
        spark: Spark session.
        platform: platform whose schema holds the table if `table` names no schema.
        table: name of the table to open.
        version: version at which the table is read, or None for the newest version.
        columns: names of the id column and of the picture column.
        where: SQL condition on the rows; an empty condition selects all rows.
        has_paths: whether the picture column holds paths or URIs.

    Raises:
        UserError: the table, the version or a column does not exist, the type of the picture column cannot hold
            pictures, or the condition is not valid SQL.
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
    kind = frame.schema[image].dataType
    if not isinstance(kind, StringType if has_paths else BinaryType | StringType):
        expected = "a string column of paths or URIs" if has_paths else "a binary column of picture files"
        raise UserError(
            f"column {image!r} of table {name} holds no pictures",
            where=f"version {pinned}",
            got=f"type {kind.simpleString()}",
            fix=f"name {expected}" + ("" if has_paths else ", or a string column of base64 text"),
        )
    identity = frame[identity_column].cast("string").alias("image_id")
    file = F.col("_metadata.file_name").alias("file")
    rows = filter_rows(frame, where, where=f"table {name}").select(identity, frame[image].alias("image"), file)
    location = platform.table_location(name)
    commit = read_commit_ids(spark, name, location, [pinned]).get(pinned)
    return SourceTable(name, location, pinned, commit, rows, frame.select(identity))


def arrow_columns(schema: StructType) -> pa.Schema:
    """Return the columns of a table with their Arrow types.

    A Spark type without an Arrow counterpart becomes Arrow's null type.
    """
    return pa.schema([(field.name, _arrow_type(field.dataType)) for field in schema.fields])


def _arrow_type(kind: DataType) -> pa.DataType:
    if isinstance(kind, ArrayType):
        return pa.list_(_arrow_type(kind.elementType))
    if isinstance(kind, StructType):
        return pa.struct(list(arrow_columns(kind)))
    return ARROW_TYPES.get(kind.typeName(), pa.null())


def unchanged_files(spark: SparkSession, source: SourceTable, done: DataFrame) -> DataFrame:
    """Return the data files that are in the pinned table version and also in an earlier version with captioned rows.

    An earlier version counts only if the table still has the commit at which the rows were captioned. Otherwise the
    table was written anew or restored after the captioning.

    Args:
        spark: Spark session.
        source: table to caption.
        done: captioned rows, with the columns source_version and source_commit.

    Returns:
        Rows with the columns source_version (the earlier version), source_commit, file and is_unchanged (always true).
    """
    groups = done.where("source_commit IS NOT NULL").groupBy("source_version", "source_commit").count().collect()
    kept = read_commit_ids(spark, source.name, source.location, {group["source_version"] for group in groups})
    rows = {
        group["source_version"]: group["count"]
        for group in groups
        if kept.get(group["source_version"]) == group["source_commit"]
    }
    earlier = compared_versions(rows, source.version)
    now = _files_at(spark, source.name, source.version) if earlier else set()
    found = [
        (version, kept[version], file, True)
        for version in earlier
        for file in now & _files_at(spark, source.name, version)
    ]
    schema = "source_version BIGINT, source_commit STRING, file STRING, is_unchanged BOOLEAN"
    return spark.createDataFrame(found, schema)


def _files_at(spark: SparkSession, name: str, version: int) -> set[str]:
    """Return the names of a table's data files at a version, or no names if Delta no longer has that version.

    Delta never changes a data file, so a row that is in the same data file at two versions is unchanged.
    """
    try:
        found = spark.read.option("versionAsOf", version).table(name).inputFiles()
    except AnalysisException:
        return set()
    return {path.rpartition("/")[2] for path in found}


def compared_versions(rows: Mapping[int, int], newest: int) -> list[int]:
    """Choose the earlier versions of a table whose data files the caller compares with the newest version's data files.

    A nightly job captions rows of a new table version every night, and listing the data files of one version takes
    seconds. Therefore, this function chooses only the versions with the most captioned rows. For all other versions,
    the pictures of the captioned rows are read again and compared by their bytes. A row with an unchanged picture then
    counts as captioned from the newest version.

    Args:
        rows: dict from a table version to the number of rows that were captioned at this version.
        newest: newest version of the table, from which rows are captioned now.
    """
    earlier = sorted(rows.keys() - {newest}, key=lambda version: (-rows[version], version))
    return earlier[:MAX_COMPARED_VERSIONS]


def _read(spark: SparkSession, platform: Platform, name: str, version: int | None) -> tuple[int, DataFrame]:
    """Read the table at a version, or at the newest version if `version` is None. Return the version and the rows."""
    try:
        newest = newest_version(spark, name)
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
    except AnalysisException as error:
        raise UserError(
            f"table {name} cannot be read at version {pinned}",
            where=name,
            got=_first_line(error),
            fix=f"choose a version that DESCRIBE HISTORY lists; the newest is {newest}",
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]

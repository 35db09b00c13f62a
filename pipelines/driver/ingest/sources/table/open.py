"""Delta table sources: the first ingest reads one version of a table, and later ingests read only the changes.

The changes come from the table's change data feed. If the change data feed cannot be read, or does not show which
pictures are gone, all rows of the table are read. Reading the complete table takes longer, but has the same result: no
row is added twice, and pictures whose rows are gone are removed (`Covered`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
from deltalake.exceptions import DeltaError
from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from pipelines.config import DataConfig, TableSourceConfig, short_hash
from pipelines.driver.delta.commits import read_commit_ids
from pipelines.driver.delta.spark_errors import filter_rows, retention_fix
from pipelines.driver.delta.versions import newest_version
from pipelines.driver.ingest.ledger import VERSION, items_table
from pipelines.driver.ingest.sources.files import absolute_path
from pipelines.driver.ingest.sources.source import Covered, Source, SourceRows, require_columns, used_columns
from pipelines.driver.ingest.sources.table.changes import SourceTable, quote_name, read_changes
from pipelines.errors import UserError
from pipelines.executor.ingest.records.table import delta_records
from pipelines.formats.delta_files import commit_id, open_delta
from pipelines.platform import analysed, spark_errors

logger = logging.getLogger(__name__)

OTHER_CHARS = 2**20
"""Largest number of characters (or bytes) that `quarantine` stores of a value in an unused column."""
PLAIN = (
    *(T.StringType, T.CharType, T.VarcharType, T.BinaryType, T.BooleanType, T.NumericType, T.DateType),
    *(T.TimestampType, T.TimestampNTZType),
)
"""Spark types whose values executors receive unchanged. Structs, arrays and maps of these types are unchanged too.
Values of all other types are converted to text."""


def open_table(
    spark: SparkSession, name: str, source: TableSourceConfig, config: DataConfig, ingested: pa.Table
) -> Source:
    """Open the configured or newest version of a table, and select the rows that changed since the last ingest.

    All rows are read in each of these cases:

    - The table was not ingested before with these settings.
    - The configured version is older than the ingested version.
    - The table was written anew or restored since the last ingest.
    - Delta no longer keeps the commit that the last ingest read, so the ids of the commits cannot be compared.
    - The changes cannot be read.

    Raises:
        UserError: no table is configured, the table or version cannot be read, a column is missing or has a type that
            cannot be read, or the filter is not valid SQL.
    """
    table = _read_version(spark, source)
    require_columns(config, table.frame.columns, source.where)
    frame = filter_rows(table.frame, source.filter, where="data.source.filter")
    ingest_id = short_hash(name, table.table_id, table.version, table.commit)
    last, commit = _last_ingest(ingested, table.table_id)
    if last == table.version and commit == table.commit is not None:
        return Source(None, ingest_id, items_table([]), 1)
    changes = None
    if last is not None and last < table.version and _commit(spark, source, table.name, last) == commit:
        changes = read_changes(spark, table._replace(frame=frame), name, source, last)
    file = source.where.rstrip("/").rpartition("/")[2]
    if changes is None:
        covered: Covered | None = Covered(file)
    else:
        covered = Covered(file, changes.image_ids) if changes.image_ids is not None else None
    used = tuple(dict.fromkeys(used_columns(config).values()))
    rows = select_columns(frame if changes is None else changes.rows, used, file)
    read = partial(delta_records, names=used, image=source.columns.image)
    pending = items_table([(table.table_id, _state(table.version, table.commit))])
    return Source(SourceRows(rows, read), ingest_id, pending, 0, covered)


def require_local_table(source: TableSourceConfig) -> None:
    """Check that a Delta table is at the path of a source on a local disk. A table of a catalog is not checked.

    Raises:
        UserError: no table is configured, or there is no Delta table in the folder.
    """
    _require_name(source)
    folder = "" if source.table else absolute_path(source.path)
    if folder and not Path(folder, "_delta_log").is_dir():
        raise UserError(
            "the input cannot be read as a Delta table",
            where=source.where,
            got="no folder _delta_log" if Path(folder).is_dir() else "no such folder",
            fix="give the path of an existing Delta table's folder with --set data.source.path=FOLDER",
        )


def require_table(spark: SparkSession, source: TableSourceConfig, config: DataConfig) -> None:
    """Check that the table of a source can be read and has the columns of the config.

    Raises:
        UserError: no table is configured, the table or version cannot be read, or a column is missing.
    """
    require_columns(config, _read_version(spark, source).frame.columns, source.where)


def open_ingested_table(name: str, source: TableSourceConfig, ingested: pa.Table) -> Source | None:
    """Open a table on a local disk without Spark if the last ingest read the same version of the table, else return
    None."""
    if source.table or not source.path:
        return None
    try:
        table = open_delta(absolute_path(source.path))
    except DeltaError:
        return None
    version = table.version() if source.version is None else source.version
    table_id, commit = str(table.metadata().id), commit_id(Path(absolute_path(source.path)), version)
    if commit is None or _last_ingest(ingested, table_id) != (version, commit):
        return None
    return Source(None, short_hash(name, table_id, version, commit), items_table([]), 1)


def _state(version: int, commit: str | None) -> str:
    return f"{VERSION}{version} {commit}" if commit else f"{VERSION}{version}"


def _last_ingest(ingested: pa.Table, table_id: str) -> tuple[int | None, str | None]:
    """Return the version of a table that the last ingest read, and the id of its commit.

    The version is None if the table was not ingested with these settings. The id is None if it is not known.
    """
    states = [row["state"] for row in ingested.to_pylist() if row["item"] == table_id]
    if not states:
        return None, None
    version, _, commit = states[-1].removeprefix(VERSION).partition(" ")
    return int(version), commit or None


def _commit(spark: SparkSession, source: TableSourceConfig, name: str, version: int) -> str | None:
    """Return the id of the commit that made a version, or None if Delta no longer keeps the commit."""
    location = None if source.table else absolute_path(source.path)
    return read_commit_ids(spark, name, location, [version]).get(version)


# ------------------------------------------------------------------------------------------------ the table


def _require_name(source: TableSourceConfig) -> None:
    if not source.where:
        fix = "choose a table with --set data.source.table=CATALOG.SCHEMA.TABLE, or --set data.source.path=FOLDER"
        raise UserError("the run has no input", where="data.source.table", got="nothing", fix=fix)


def _read_version(spark: SparkSession, source: TableSourceConfig) -> SourceTable:
    _require_name(source)
    parts = source.table.split(".") if source.table else ("delta", absolute_path(source.path))
    quoted = ".".join(map(quote_name, parts))
    try:
        newest = newest_version(spark, quoted, None if source.table else absolute_path(source.path))
        table_id = spark.sql(f"DESCRIBE DETAIL {quoted}").collect()[0]["id"]
        version = newest if source.version is None else source.version
        frame = analysed(spark.sql(f"SELECT * FROM {quoted} VERSION AS OF {version}"))  # noqa: S608 (quoted)
    except spark_errors() as error:
        fix = retention_fix(error)
        if fix is None and not isinstance(error, AnalysisException):
            raise
        if isinstance(error, AnalysisException) and "VIEW" in (error.getCondition() or ""):
            fix = "a view has no versions: read its table and use data.source.filter, or write the view to a table"
        raise UserError(
            "the input cannot be read as a Delta table",
            where=source.where,
            got=str(error).strip().partition("\n")[0][:500],
            fix=fix or "choose an existing Delta table, and one of the versions that `DESCRIBE HISTORY` lists",
        ) from None
    return SourceTable(frame, table_id, version, _commit(spark, source, quoted, version), quoted)


def select_columns(frame: DataFrame, used: Sequence[str], file: str) -> DataFrame:
    """Select the columns that `delta_records` expects: file, the used columns, and a struct of all other columns.

    Raises:
        UserError: a used column has a type whose values are not plain and cannot be converted to text.
    """
    types = {field.name: field.dataType for field in frame.schema.fields}
    needed = []
    for n, name in enumerate(used):
        column = _plain(frame, name, types[name])
        if column is None:
            raise UserError(
                "a column of the input table has a type that cannot be read",
                where=f"column {name}",
                got=f"type {types[name].simpleString()}",
                fix="choose a column that contains pictures, texts or ids",
            )
        needed.append(column.alias(f"used_{n}"))
    others = [_shortened(frame, name, kind).alias(name) for name, kind in types.items() if name not in used]
    struct = F.struct(*others) if others else F.lit(None).cast("string")
    return frame.select(F.lit(file).alias("file"), *needed, struct.alias("others"))


def _plain(frame: DataFrame, name: str, kind: T.DataType) -> Column | None:
    """Return a column unchanged if its type is plain, else as text; return None if the column has no text form."""
    column = F.col(quote_name(name))
    if _is_plain(kind):
        return column
    try:
        analysed(frame.select(column.cast("string")))
    except AnalysisException:  # for example GEOMETRY
        return None
    return column.cast("string")


def _shortened(frame: DataFrame, name: str, kind: T.DataType) -> Column:
    column = _plain(frame, name, kind)
    if column is None:
        return F.lit(f"a value of type {kind.simpleString()}")
    is_long = isinstance(kind, (T.StringType, T.BinaryType)) or not _is_plain(kind)
    return F.substring(column, 1, OTHER_CHARS) if is_long else column


def _is_plain(kind: T.DataType) -> bool:
    if isinstance(kind, T.StructType):
        return all(_is_plain(field.dataType) for field in kind.fields)
    if isinstance(kind, T.ArrayType):
        return _is_plain(kind.elementType)
    if isinstance(kind, T.MapType):
        return _is_plain(kind.keyType) and _is_plain(kind.valueType)
    return isinstance(kind, PLAIN)

"""Functions that create, query and read Delta tables in folders, without Spark."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard
from urllib.parse import unquote, urlsplit

import pyarrow as pa

from pipelines.errors import UserError
from pipelines.formats.format_version import PROPERTY, check_format
from pipelines.formats.table_schema import Table

if TYPE_CHECKING:
    from deltalake import DeltaTable


BATCH_ROWS = 32
"""Number of rows in a batch of a query that may read pictures. A row may contain a picture of 50 MB."""
NARROW_BATCH_ROWS = 8192
"""Number of rows in a batch of a query that reads only short values."""
UNSUPPORTED = re.compile(r"[\[\]\\^|#?\x00-\x1f]|%[0-9A-Fa-f]{2}")
"""Pattern of the characters in a path that make `deltalake` fail, end the process, use another folder, or return an
empty history.

Spark can read tables in folders whose paths contain these characters.
"""


def is_supported(folder: Path | None) -> TypeGuard[Path]:
    """Return whether `deltalake` can open tables in a folder. `folder` is None if a catalog manages the tables."""
    return folder is not None and not UNSUPPORTED.search(str(folder))


def open_delta(location: Path | str, version: int | None = None) -> DeltaTable:
    """Open a Delta table without Spark.

    Args:
        location: path of a folder, or URL.
        version: version of the table, or None for the newest version.

    Raises:
        DeltaError: there is no table, or `deltalake` does not support the path.
        UserError: the file of the newest commit is empty.
    """
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError

    if "://" not in str(location) and not is_supported(Path(location)):
        raise DeltaError(f"only Spark can read a table whose path contains [ ] \\ ^ | # ? or %41: {location}")
    table = DeltaTable(location, version=version)
    if version is None and "://" not in str(location):
        _check_newest_commit(Path(location), table.version())
    return table


def _check_newest_commit(folder: Path, version: int) -> None:
    """Check that the newest commit is not an empty file, which a power failure may leave behind.

    Delta and `deltalake` report no error for an empty commit, and treat it as a commit that changed no rows.
    """
    commit = _commit_file(folder, version)
    if commit.is_file() and not commit.stat().st_size:
        raise UserError(
            "the newest commit of a Delta table is an empty file, so rows are missing",
            where=str(commit),
            got="0 bytes: the machine may have lost power, or the disk may have been full, when the commit was written",
            fix="restore the file from a backup; or delete the file and its .crc file, and run `lakesight ingest "
            "--refresh`, which adds the missing rows again",
        )


def _commit_file(folder: Path, version: int) -> Path:
    return folder / "_delta_log" / f"{version:020}.json"


def commit_id(folder: Path, version: int) -> str | None:
    """Return the id of the commit that made a version of a table, or None if Delta no longer keeps the commit.

    A version number alone does not identify the content of a table. If a table is written anew, or is restored from a
    copy and then changed, its versions have the same numbers as before, but other rows. The id is a hash of the commit
    file, which contains random file names, so two commits never have the same id. A copied or moved table keeps its
    ids.

    Args:
        folder: local folder of the table.
        version: version of the table.
    """
    try:
        with _commit_file(folder, version).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except FileNotFoundError:
        return None


def local_folder(table: DeltaTable) -> Path:
    """Return the folder of a table on a local disk."""
    return Path(unquote(urlsplit(table.table_uri).path))


def open_or_create(folder: Path, table: Table) -> DeltaTable:
    """Open a table in a folder, without Spark. Create the table if it does not exist, and add missing columns.

    The function adds no CHECK constraints, because `deltalake` refuses some of their conditions. Tables with CHECK
    constraints must be created with Spark.

    Raises:
        UserError: a newer release of Lakesight wrote the table.
    """
    from deltalake import DeltaTable
    from deltalake import Field as DeltaField

    opened = DeltaTable.create(
        folder,
        table.arrow_schema,
        mode="ignore",
        name=table.name,
        description=table.comment,
        configuration=table.properties,
        raise_if_key_not_exists=False,  # allow the key `lakesight.format`, which Delta does not know
    )
    check_table_format(opened)
    existing = {field.name for field in opened.schema().fields}
    missing = [column for column in table.columns if column.name not in existing]
    if missing:
        opened.alter.add_columns([DeltaField.from_arrow(pa.field(c.name, c.type)) for c in missing])
    return opened


def check_table_format(table: DeltaTable) -> None:
    """Check that this release of Lakesight can read one of Lakesight's tables.

    Raises:
        UserError: a newer release of Lakesight wrote the table.
    """
    check_format(int(table.metadata().configuration.get(PROPERTY, 0)), table.table_uri)


def quoted_name(name: str) -> str:
    """Quote the name of a column for an SQL statement of `query`."""
    return '"' + name.replace('"', '""') + '"'


def quoted_text(text: str) -> str:
    """Return a text as a literal in SQL for `query`."""
    return "'" + text.replace("'", "''") + "'"


def quoted_value(value: str | datetime) -> str:
    """Return a text or a time as a literal in SQL for `query`. A time must have a time zone."""
    if isinstance(value, str):
        return quoted_text(value)
    micros = (value - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    return f"arrow_cast({micros}, 'Timestamp(Microsecond, Some(\"UTC\"))')"


def query(tables: Mapping[str, DeltaTable], sql: str, batch_rows: int = BATCH_ROWS) -> pa.RecordBatchReader:
    """Run an SQL query on Delta tables, without Spark. Without ORDER BY, rows have the order of the files.

    The engine can read tables with deletion vectors or column mapping, which Arrow's datasets refuse. Also, opening an
    Arrow dataset imports pandas, which takes longer than the rest of a short command.

    Args:
        tables: Delta tables, by their names in the query.
        sql: query in the SQL of DataFusion, the engine inside the package `deltalake`.
        batch_rows: largest number of rows in a batch that the engine reads at once.

    Raises:
        DeltaError: the query is not valid on these tables.
    """
    from deltalake import QueryBuilder

    # The query runs in one partition, because with several partitions the order of rows is random.
    settings = {"target_partitions": "1", "batch_size": str(batch_rows)}
    engine = QueryBuilder({f"datafusion.execution.{name}": value for name, value in settings.items()})
    for name, table in tables.items():
        engine.register(name, table)
    reader = pa.RecordBatchReader.from_stream(engine.execute(sql))
    return reader.cast(pa.schema([field.with_type(_without_views(field.type)) for field in reader.schema]))


def _without_views(kind: pa.DataType) -> pa.DataType:
    """Replace Arrow's view types, which DataFusion uses for strings, by types that pyarrow's writers support."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_views(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_without_views(kind.value_type)))
    return {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}.get(kind, kind)


def to_rows(table: pa.Table) -> list[dict[str, Any]]:
    """Convert an Arrow table to one dict per row, as `pyarrow.Table.to_pylist` does, but without importing pandas.

    To convert a time with a time zone, pyarrow imports pandas, which takes longer than the rest of a short command.
    Delta stores all times in UTC, so this function removes the time zone and adds it again.
    """
    in_utc = [field.name for field in table.schema if pa.types.is_timestamp(field.type) and field.type.tz == "UTC"]
    kinds = [pa.timestamp(field.type.unit) if field.name in in_utc else field.type for field in table.schema]
    fields = [field.with_type(kind) for field, kind in zip(table.schema, kinds, strict=True)]
    rows: list[dict[str, Any]] = table.cast(pa.schema(fields)).to_pylist()
    for row in rows:
        row |= {name: row[name].replace(tzinfo=UTC) for name in in_utc if row[name] is not None}
    return rows


def query_rows(table: DeltaTable, select: str, where: str, rest: str = "") -> list[dict[str, Any]]:
    """Read columns with short values from some rows of a table, without Spark.

    Args:
        table: Delta table.
        select: expressions after SELECT. Column names must be in lower case, because they are not quoted.
        where: condition in SQL.
        rest: other clauses after the condition, such as ORDER BY.
    """
    sql = f"SELECT {select} FROM source WHERE {where} {rest}"  # noqa: S608 the callers quote values
    return to_rows(query({"source": table}, sql, NARROW_BATCH_ROWS).read_all())

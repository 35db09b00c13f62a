"""Schema of a Delta table: columns with types and comments, constraints, and the SQL that is derived from them.

The type of a column is given once, as an Arrow type, because executors exchange Arrow batches. The SQL type is derived
from the Arrow type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from pipelines.formats.format_version import FORMAT, PROPERTY

TIME_TYPE = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True)
class Column:
    """A column of a Delta table: its name, its Arrow type, its comment, and whether its values may be null."""

    name: str
    type: pa.DataType
    comment: str
    nullable: bool = False

    def ddl(self) -> str:
        """Return the column's part of a CREATE TABLE statement."""
        return f"{self.name} {sql_type(self.type)}{'' if self.nullable else ' NOT NULL'} COMMENT '{self.comment}'"


@dataclass(frozen=True)
class Table:
    """A Delta table.

    Attributes:
        name: name of the table without catalog and schema.
        key: names of the columns that identify a row.
        comment: what a row of the table stands for, such as "One row per picture that can be trained on".
        columns: all columns, in the order of the table.
        checks: SQL conditions of the CHECK constraints, by name of the constraint.
        cluster_by: names of the columns by which Delta clusters the rows. Pipeline stages select rows by these columns.
        followed: whether the change data feed of the table is enabled.
    """

    name: str
    key: tuple[str, ...]
    comment: str
    columns: tuple[Column, ...]
    checks: Mapping[str, str] = field(default_factory=dict)
    cluster_by: tuple[str, ...] = ()
    followed: bool = False

    @property
    def properties(self) -> dict[str, str]:
        """Table properties for Delta.

        Deletion vectors are off, so that every Delta reader can read the table, including the package `deltalake`.
        Delta collects statistics of scalar columns only. To count the nulls of a picture column, Delta would copy all
        pictures.
        """
        feed = {"delta.enableChangeDataFeed": "true"} if self.followed else {}
        scalar = [c.name for c in self.columns if not (pa.types.is_nested(c.type) or pa.types.is_binary(c.type))]
        statistics = {"delta.dataSkippingStatsColumns": ",".join(scalar)}
        return {"delta.enableDeletionVectors": "false", PROPERTY: str(FORMAT), **statistics, **feed}

    @property
    def arrow_schema(self) -> pa.Schema:
        """Arrow schema of the table, including which columns may be null."""
        return pa.schema([pa.field(c.name, c.type, nullable=c.nullable) for c in self.columns])

    @property
    def names(self) -> list[str]:
        """Names of the columns, in the order of `columns`."""
        return [c.name for c in self.columns]

    def insert_clause(self, alias: str) -> str:
        """Return the INSERT clause of a MERGE statement, which inserts all columns of this definition.

        `INSERT *` would also require values for columns that users have added to the table.
        """
        return f"INSERT ({', '.join(self.names)}) VALUES ({', '.join(f'{alias}.{name}' for name in self.names)})"  # noqa: S608 (names of our own)

    def update_clause(self, alias: str) -> str:
        """Return the UPDATE clause of a MERGE statement, which sets all columns of this definition."""
        return f"UPDATE SET {', '.join(f'{name} = {alias}.{name}' for name in self.names)}"

    def ddl(self) -> str:
        """Return the column list of a CREATE TABLE statement, including comments."""
        return ", ".join(column.ddl() for column in self.columns)


def sql_type(arrow: pa.DataType) -> str:
    """Return the name of an Arrow type in Spark SQL.

    Raises:
        ValueError: this function knows no SQL name for the Arrow type.
    """
    if pa.types.is_struct(arrow):
        return f"STRUCT<{', '.join(f'{f.name}: {sql_type(f.type)}' for f in arrow)}>"
    if pa.types.is_list(arrow):
        return f"ARRAY<{sql_type(arrow.value_type)}>"
    names = {
        pa.string(): "STRING",
        pa.binary(): "BINARY",
        pa.int32(): "INT",
        pa.int64(): "BIGINT",
        pa.float64(): "DOUBLE",
        TIME_TYPE: "TIMESTAMP",
    }
    if arrow not in names:
        raise ValueError(f"no SQL type for the Arrow type {arrow}: add it to sql_type")
    return names[arrow]

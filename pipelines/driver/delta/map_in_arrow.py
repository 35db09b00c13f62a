"""Function that converts an Arrow schema to the SQL text that `DataFrame.mapInArrow` takes."""

from __future__ import annotations

import pyarrow as pa

from pipelines.formats.table_schema import sql_type


def spark_schema(schema: pa.Schema) -> str:
    """Return an Arrow schema as the SQL column list that mapInArrow takes."""
    columns = (f"`{field.name}` {sql_type(field.type)}{'' if field.nullable else ' NOT NULL'}" for field in schema)
    return ", ".join(columns)

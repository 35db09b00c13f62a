"""Helpers for `DataFrame.mapInArrow`: the result schema as SQL, and the number of torch threads of a task."""

from __future__ import annotations

import pyarrow as pa
from pyspark.sql import SparkSession

from pipelines.formats.table_schema import sql_type


def task_threads(spark: SparkSession) -> int:
    """Return how many threads torch may use in one Spark task, which is the value of spark.task.cpus."""
    return int(spark.conf.get("spark.task.cpus", "1") or 1)


def spark_schema(schema: pa.Schema) -> str:
    """Return an Arrow schema as the SQL column list that mapInArrow takes."""
    columns = (f"`{field.name}` {sql_type(field.type)}{'' if field.nullable else ' NOT NULL'}" for field in schema)
    return ", ".join(columns)

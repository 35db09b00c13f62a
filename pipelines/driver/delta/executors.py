"""What a stage needs to run a function of Arrow batches on executors: its result as SQL columns, its share of cores."""

from __future__ import annotations

import pyarrow as pa
from pyspark.sql import SparkSession

from pipelines.formats.tables import sql_type


def task_threads(spark: SparkSession) -> int:
    """Threads for torch in one task: the cores that Spark itself counts for it."""
    return int(spark.conf.get("spark.task.cpus", "1") or 1)


def spark_schema(schema: pa.Schema) -> str:
    """The column list of a mapInArrow result."""
    columns = (f"`{field.name}` {sql_type(field.type)}{'' if field.nullable else ' NOT NULL'}" for field in schema)
    return ", ".join(columns)

"""Function that merges the metrics of an evaluation into table `evaluations`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import partial

from pyspark.sql import SparkSession

from pipelines.driver.delta.model_rows import SAME_MODEL
from pipelines.driver.delta.retry import retry_on_conflict
from pipelines.formats.tables import EVALUATIONS, MODEL_DIGEST
from pipelines.platform import Platform


def merge_rows(spark: SparkSession, platform: Platform, rows: Iterable[Mapping[str, object]]) -> None:
    """Merge rows into table `evaluations`. Rows of the table whose numbers have not changed are not written again.

    Args:
        spark: Spark session.
        platform: platform that stores the table.
        rows: rows to merge, each a dict from the name of a column to the value, without the column `evaluated_at`.
    """
    now = {"evaluated_at": datetime.now(UTC)}
    values = [tuple({**row, **now}[name] for name in EVALUATIONS.names) for row in rows]
    table = platform.table(EVALUATIONS.name)
    retry_on_conflict(partial(_merge, spark, table, values), where=table)


def _merge(spark: SparkSession, table: str, values: list[tuple[object, ...]]) -> None:
    new = spark.createDataFrame(values, EVALUATIONS.ddl())
    keys = " AND ".join(f"old.{key} <=> new.{key}" for key in EVALUATIONS.key if key != MODEL_DIGEST.name)
    differs = " OR ".join(f"NOT old.{name} <=> new.{name}" for name in ("value", "low", "high", "n", "tokenisation"))
    spark.sql(
        f"MERGE INTO {table} old USING {{rows}} new ON {keys} AND {SAME_MODEL} "
        f"WHEN MATCHED AND ({differs}) THEN {EVALUATIONS.update_clause('new')} "
        f"WHEN NOT MATCHED THEN {EVALUATIONS.insert_clause('new')}",
        rows=new,
    )

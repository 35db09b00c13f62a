"""Settings and counters of a Spark session."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@contextmanager
def spark_settings(spark: SparkSession, **values: str) -> Iterator[None]:
    """Set Spark settings for the block, then restore the previous values."""
    before = {key: str(spark.conf.get(key)) for key in values}
    try:
        for key, value in values.items():
            spark.conf.set(key, value)
        yield
    finally:
        for key, value in before.items():
            spark.conf.set(key, value)


def executed_queries(spark: SparkSession) -> int:
    """Count the queries that a session has run."""
    return int(spark._jsparkSession.sharedState().statusStore().executionsCount())

"""Helper that counts the queries of a Spark session."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def executed_queries(spark: SparkSession) -> int:
    """Count the queries that a session has run."""
    return int(spark._jsparkSession.sharedState().statusStore().executionsCount())

"""Tests that Spark's Python workers, which decode untrusted pictures, do not have the credentials of the driver."""

from __future__ import annotations

import pytest
from pyspark.sql import SparkSession
from spark_session import CREDENTIALS, CREDENTIALS_OF_STORES
from worker_variables import names_of_variables

from pipelines.child_process import READS_URLS
from pipelines.config import DataConfig
from pipelines.driver.ingest.ledger import items_table
from pipelines.driver.ingest.sources.open import open_source
from pipelines.errors import UserError
from pipelines.platform import Platform


def variables_in_query(spark: SparkSession) -> set[str]:
    return {row["name"] for row in spark.range(1).mapInArrow(names_of_variables, "name string").collect()}


def variables_in_task(spark: SparkSession) -> set[str]:
    rows = spark.sparkContext.parallelize([0], 1)
    return {name for batch in rows.mapPartitions(names_of_variables).collect() for name in batch["name"].to_pylist()}


def test_python_workers_have_no_credentials_of_the_driver(spark: SparkSession) -> None:
    of_jvm = set(spark.sparkContext._jvm.System.getenv().keySet())  # type: ignore[union-attr]
    assert {*CREDENTIALS, *CREDENTIALS_OF_STORES} <= of_jvm, "the driver had the credentials when Spark started"
    for found in (variables_in_query(spark), variables_in_task(spark)):
        assert sorted(found & {*CREDENTIALS, *CREDENTIALS_OF_STORES}) == []
        assert {"PATH", "PYTHONPATH", "PYTHONSAFEPATH"} <= found


def test_python_workers_have_credentials_of_object_stores_only_if_the_source_is_a_url(
    spark: SparkSession, platform: Platform, source: str
) -> None:
    config = DataConfig.model_validate({"source": {"kind": "csv", "path": "nostore://bucket/a.csv"}})
    try:
        with pytest.raises(UserError, match="nostore:// cannot be opened"):
            open_source(spark, platform, source, config, items_table([]))
        found = variables_in_query(spark)
    finally:
        spark.sparkContext.environment.pop(READS_URLS, None)
    assert sorted(found & {*CREDENTIALS, *CREDENTIALS_OF_STORES}) == sorted(CREDENTIALS_OF_STORES)
    assert not variables_in_query(spark) & set(CREDENTIALS_OF_STORES)

"""Helpers that open a Spark session for the tests of a folder, and count the queries of a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from processes import TEST_PATH
from pyspark.sql import SparkSession

from pipelines.driver.delta.tables import ensure_tables
from pipelines.platform import Platform

CREDENTIALS = ("DATABRICKS_TOKEN", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "MY_VARIABLE")
CREDENTIALS_OF_STORES = ("AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_KEY", "GOOGLE_APPLICATION_CREDENTIALS", "https_proxy")
"""Environment variables that the driver has while it starts the Spark session that tests share."""


@contextmanager
def open_session(platform: Platform) -> Iterator[SparkSession]:
    """Open the Spark session of a platform, create all tables, and stop the session at the end.

    If the process has run tests of another folder, the Spark session of that folder is stopped first.
    """
    if earlier := SparkSession.getActiveSession():
        earlier.stop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", TEST_PATH)  # executors import modules of tests/support
        for name in (*CREDENTIALS, *CREDENTIALS_OF_STORES):  # `test_worker_environment.py` checks these variables
            patch.setenv(name, "c4nary")
        session = platform.open_spark()
    # Tests query few rows: code generation and adaptive planning would take longer than the queries. The test of
    # `lakesight demo` uses Spark's defaults, with code generation and adaptive planning.
    session.conf.set("spark.sql.codegen.wholeStage", "false")
    session.conf.set("spark.sql.codegen.factoryMode", "NO_CODEGEN")
    session.conf.set("spark.sql.adaptive.enabled", "false")
    ensure_tables(session, platform)
    yield session
    session.stop()


def executed_queries(spark: SparkSession) -> int:
    """Count the queries that all sessions of the Spark context have run."""
    return int(spark._jsparkSession.sharedState().statusStore().executionsCount())


def count_shuffled_rows(spark: SparkSession, run: Callable[[], object]) -> int:
    """Call a function that runs Spark jobs, and return how many rows the jobs sent between tasks (shuffle writes)."""
    return _sum_of_stages(spark, run, "shuffleWriteRecords")


def count_shuffled_bytes(spark: SparkSession, run: Callable[[], object]) -> int:
    """Call a function that runs Spark jobs, and return how many bytes the jobs sent between tasks (shuffle writes)."""
    return _sum_of_stages(spark, run, "shuffleWriteBytes")


def _sum_of_stages(spark: SparkSession, run: Callable[[], object], figure: str) -> int:
    """Call a function that runs Spark jobs, and return the sum of a figure of `StageData` over the jobs' stages."""
    context, gateway = spark.sparkContext._jsc.sc(), spark.sparkContext._gateway
    assert gateway is not None

    def finished_stages() -> dict[int, int]:
        context.listenerBus().waitUntilEmpty()
        quantiles = gateway.new_array(gateway.jvm.double, 0)
        stages = context.statusStore().stageList(None, False, False, quantiles, None)
        found = [stages.apply(number) for number in range(stages.size())]
        return {stage.stageId(): int(getattr(stage, figure)()) for stage in found}

    before = finished_stages()
    run()
    return sum(value for stage, value in finished_stages().items() if stage not in before)

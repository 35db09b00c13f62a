"""Tests of the code that treats classic Spark sessions and Spark Connect sessions differently."""

from __future__ import annotations

import re
from pathlib import Path
from unittest.mock import create_autospec

import pytest
from pyspark.errors import AnalysisException
from pyspark.errors.exceptions.connect import EXCEPTION_CLASS_MAPPING
from pyspark.sql import SparkSession
from pyspark.sql.conf import RuntimeConfig

from pipelines.driver.delta.retry import CONFLICTS, WriteConflict
from pipelines.driver.delta.settings import spark_settings
from pipelines.platform.session import register_delta_errors, task_cpus

ROOT = Path(__file__).parents[3]
CLASSIC_ONLY = re.compile(r"[sS]parkContext|\._j\w+|(from|import) py4j|delta\.tables import DeltaTable|\.rdd\b")


def test_functions_that_spark_connect_lacks_are_used_only_in_the_package_platform() -> None:
    found = {
        f"{file.relative_to(ROOT)}: {line.strip()}"
        for folder in ("pipelines", "jobs")
        for file in sorted((ROOT / folder).rglob("*.py"))
        if file.parent != ROOT / "pipelines" / "platform"
        for line in file.read_text().splitlines()
        if CLASSIC_ONLY.search(line)
    }
    assert found == set()


def test_write_conflicts_of_a_spark_connect_session_raise_the_exception_classes_that_are_retried() -> None:
    register_delta_errors()
    retried = [found for found in EXCEPTION_CLASS_MAPPING.values() if issubclass(found, CONFLICTS)]
    assert len(retried) == len(set(CONFLICTS) - {WriteConflict})


def test_refused_settings_are_skipped_unless_they_are_required_and_other_settings_are_restored() -> None:
    spark = create_autospec(SparkSession, instance=True, conf=create_autospec(RuntimeConfig, instance=True))
    values = {"accepted": "before"}

    def set_value(key: str, value: str) -> None:
        if key == "refused":
            raise AnalysisException("[CONFIG_NOT_AVAILABLE] Configuration refused is not available.")
        values[key] = value

    spark.conf.get.side_effect = values.get
    spark.conf.set.side_effect = set_value
    with spark_settings(spark, {"refused": "1", "accepted": "2"}):
        assert values == {"accepted": "2"}
    assert values == {"accepted": "before"}
    with pytest.raises(AnalysisException), spark_settings(spark, {"accepted": "2", "refused": "1"}, required=True):
        pytest.fail("the block runs without a required setting")
    assert values == {"accepted": "before"}
    spark.conf.unset.assert_not_called()


def test_the_number_of_cores_per_task_is_one_if_the_session_refuses_to_return_the_setting() -> None:
    spark = create_autospec(SparkSession, instance=True, conf=create_autospec(RuntimeConfig, instance=True))
    spark.conf.get.return_value = "4"
    assert task_cpus(spark) == 4
    spark.conf.get.side_effect = AnalysisException("[CONFIG_NOT_AVAILABLE]")
    assert task_cpus(spark) == 1

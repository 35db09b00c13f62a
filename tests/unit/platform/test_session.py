"""Tests of the code that treats classic Spark sessions and Spark Connect sessions differently."""

from __future__ import annotations

import re
from pathlib import Path

from pyspark.errors.exceptions.connect import EXCEPTION_CLASS_MAPPING

from pipelines.driver.delta.retry import CONFLICTS, WriteConflict
from pipelines.platform.session import register_delta_errors

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

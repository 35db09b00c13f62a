"""Tests of table `decisions` in a workspace, where Spark reads and writes the table."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

from pyspark.sql import SparkSession

from pipelines.driver.evaluate.decisions import newest_champion_change, record_decision, recorded_champion
from pipelines.platform import Platform


def test_a_decision_that_was_seen_earlier_stays_before_a_decision_that_was_recorded_in_the_meantime(
    spark: SparkSession, platform: Platform
) -> None:
    workspace = replace(platform, tables=None)  # without a table folder, Spark reads every table
    decide = partial(record_decision, lambda: spark, workspace, model="m-catalog", digest="d", champion=None)
    decide(version="1", action="promote")
    seen_at = datetime.now(UTC)
    decide(version="2", action="rollback")
    decide(version="1", action="promote", seen_at=seen_at)
    assert recorded_champion(lambda: spark, workspace, "m-catalog") == ("2", "d")
    newest = newest_champion_change(lambda: spark, workspace, "m-catalog")
    assert newest is not None
    assert newest["decided_at"] > seen_at, "the times have a time zone"

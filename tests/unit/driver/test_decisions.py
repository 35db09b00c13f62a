"""Tests of table `decisions` on a disk: the table is written and read without Spark."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from local_platforms import open_local
from pyspark.sql import SparkSession

from pipelines.driver.evaluate.decisions import record_decision
from pipelines.formats.tables import DECISIONS
from pipelines.platform import user_name


def no_spark() -> SparkSession:
    raise AssertionError("a JVM would start")


@pytest.mark.parametrize("digest_is_known", [True, False], ids=["new table", "table of the first release"])
def test_decisions_are_appended_to_a_delta_table_in_a_folder_without_starting_a_jvm(
    digest_is_known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = open_local(monkeypatch, tmp_path)
    assert platform.tables
    if not digest_is_known:
        columns = [field for field in DECISIONS.arrow_schema if field.name != "model_digest"]
        write_deltalake(platform.tables / "decisions", pa.schema(columns).empty_table())
    decide = partial(record_decision, no_spark, platform, model="m", digest="d", champion="1")
    decide(version="1", action="promote")
    decide(version="2", action="refuse", reasons=["too small"])
    rows = DeltaTable(platform.tables / "decisions").to_pyarrow_table().sort_by("decided_at").to_pylist()
    assert [(row["model_version"], row["action"], row["reasons"]) for row in rows] == [
        ("1", "promote", []),
        ("2", "refuse", ["too small"]),
    ]
    assert {(row["champion"], row["model_digest"], row["decided_by"]) for row in rows} == {("1", "d", user_name())}
    assert len({row["decision_id"] for row in rows}) == 2


def test_a_new_decision_counts_as_the_latest_even_if_an_earlier_decision_has_a_time_in_the_future(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = open_local(monkeypatch, tmp_path)
    decide = partial(record_decision, no_spark, platform, digest="d", champion="1", action="promote")
    decide(model="m", version="1")
    assert platform.tables
    table = DeltaTable(platform.tables / "decisions")
    table.update({"decided_at": "decided_at + INTERVAL '1 year'"})
    for version in ("2", "3"):
        decide(model="m", version=version)
    decide(model="other", version="4")
    table.update_incremental()
    rows = table.to_pyarrow_table().sort_by("decided_at").to_pylist()
    assert [row["model_version"] for row in rows] == ["4", "1", "2", "3"]
    assert rows[0]["decided_at"] < datetime.now(UTC) + timedelta(minutes=1), "other models are not affected"

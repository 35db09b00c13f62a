"""Tests of table `decisions` on a disk: the table is written and read without Spark."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from local_platforms import open_local
from pyspark.sql import SparkSession

from pipelines.driver.evaluate.decisions import find_rollback, record_decision, recorded_champion
from pipelines.formats.tables import DECISIONS
from pipelines.platform import Platform, user_name

Action = Literal["promote", "refuse", "rollback"]


def no_spark() -> SparkSession:
    raise AssertionError("a JVM would start")


@pytest.mark.parametrize("digest_is_known", [True, False], ids=["new table", "table of the first release"])
def test_decisions_are_appended_to_a_delta_table_in_a_folder_without_starting_a_jvm(
    digest_is_known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = open_local(monkeypatch, tmp_path)
    assert platform.tables
    if not digest_is_known:
        columns = [field for field in DECISIONS.arrow_schema if not field.name.endswith("_digest")]
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


@pytest.fixture
def platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Platform:
    return open_local(monkeypatch, tmp_path)


def promote(platform: Platform, version: str, champion: str | None, action: Action = "promote") -> None:
    """Record a promotion or a rollback. The digest of version 1 is "digest 1"."""
    record_decision(
        no_spark,
        platform,
        model="m",
        version=version,
        digest=f"digest {version}",
        action=action,
        champion=champion,
        champion_digest=champion and f"digest {champion}",
    )


def is_rolled_back(platform: Platform, version: str, digest: str | None = None) -> bool:
    row = find_rollback(no_spark, platform, model="m", version=version, digest=digest or f"digest {version}")
    assert row is None or row["action"] == "rollback"
    return row is not None


def test_a_version_is_rolled_back_from_the_rollback_until_it_is_the_champion_again(platform: Platform) -> None:
    def rolled_back() -> list[str]:
        return [version for version in ("1", "2", "3") if is_rolled_back(platform, version)]

    assert rolled_back() == []
    promote(platform, "1", None)
    promote(platform, "2", "1")
    assert rolled_back() == []
    promote(platform, "1", "2", "rollback")
    assert rolled_back() == ["2"]
    promote(platform, "2", "1", "refuse")
    assert rolled_back() == ["2"], "a refusal does not change the champion"
    promote(platform, "2", "1", "rollback")
    assert rolled_back() == ["1"], "a second rollback undoes the first one"
    promote(platform, "3", "2")
    promote(platform, "1", "3")
    assert rolled_back() == [], "an explicit promotion ends the effect of a rollback"


def test_a_version_that_was_never_promoted_can_be_rolled_back(platform: Platform) -> None:
    promote(platform, "1", "2", "rollback")
    assert (is_rolled_back(platform, "1"), is_rolled_back(platform, "2")) == (False, True)


def test_a_rollback_names_the_version_by_its_digest_and_by_its_number_only_if_there_is_no_digest(
    platform: Platform,
) -> None:
    promote(platform, "1", None)
    promote(platform, "2", "1")
    promote(platform, "1", "2", "rollback")
    assert not is_rolled_back(platform, "2", "digest of another registry")
    assert is_rolled_back(platform, "7", "digest 2"), "the same files were registered again"
    assert recorded_champion(no_spark, platform, "m") == ("1", "digest 1")
    assert platform.tables
    DeltaTable(platform.tables / "decisions").update({"model_digest": "NULL", "champion_digest": "NULL"})
    assert is_rolled_back(platform, "2")
    assert not is_rolled_back(platform, "1")
    assert recorded_champion(no_spark, platform, "m") == ("1", None)

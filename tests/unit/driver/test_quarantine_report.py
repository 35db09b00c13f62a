"""Tests of the example rows in the report on table `quarantine`, which is read without Spark."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import write_deltalake
from local_platforms import open_local

from pipelines.driver.ingest.quarantine_report import inspect_quarantine, open_quarantine
from pipelines.formats.tables import QUARANTINE


def refused(source_row: str, month: int, *, replayed: bool = False) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(QUARANTINE.names, "")
    row |= {"ingest_id": str(month), "source_row": source_row, "source": "birds"}
    row |= {"reason": "too_small", "quarantined_at": datetime(2026, month, 1, tzinfo=UTC)}
    return row | {"replayed_at": datetime(2026, 12, 1, tzinfo=UTC) if replayed else None}


def test_the_example_rows_are_the_newest_rows_that_no_replay_has_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = open_local(monkeypatch, tmp_path)
    assert platform.tables
    rows = [refused("a", 1), refused("b", 2), refused("c", 3), refused("c", 4, replayed=True)]
    rows.append(refused("d", 5, replayed=True))
    table = pa.Table.from_pylist(rows, QUARANTINE.arrow_schema)
    write_deltalake(platform.tables / QUARANTINE.name, table)

    def open_spark() -> Any:
        raise AssertionError("the table is read without Spark")

    found = inspect_quarantine(open_quarantine(open_spark, platform), platform, [], 2, pictures=False)
    assert [row.source_row for row in found.rows] == ["c", "b"]
    assert [(count.rows, count.replayed) for count in found.counts] == [(5, 2)]

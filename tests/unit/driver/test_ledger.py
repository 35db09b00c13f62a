"""Tests that an ingest skips exactly the items (files or tables) that need not be read again."""

from __future__ import annotations

from datetime import UTC, datetime

import pyarrow as pa

from pipelines.driver.ingest.ledger import ITEMS, items_table, select_last_versions
from pipelines.formats.table_schema import TIME_TYPE


def entries(*rows: tuple[str, str, str]) -> pa.Table:
    """Return ledger rows from tuples of item, state and rules. The newest row comes first, because code that reads a
    table must not rely on the order of its rows.
    """
    named = [dict(zip(("item", "state", "rules"), row, strict=True)) for row in rows]
    timed = [row | {"ingested_at": datetime(2026, 1, day + 1, tzinfo=UTC)} for day, row in enumerate(named)]
    schema = pa.schema([*ITEMS, ("rules", pa.string()), ("ingested_at", TIME_TYPE)])
    return pa.Table.from_pylist(timed[::-1], schema)


def test_every_file_that_was_read_with_the_same_settings_counts_as_ingested() -> None:
    found = entries(("a", "1-1", "now"), ("a", "2-2", "now"), ("b", "1-1", "now"))
    assert sorted(select_last_versions(found, "now").to_pylist(), key=str) == [
        {"item": "a", "state": "1-1"},
        {"item": "a", "state": "2-2"},
        {"item": "b", "state": "1-1"},
    ]


def test_a_table_counts_as_ingested_only_if_its_version_and_the_settings_equal_those_of_the_last_ingest() -> None:
    """An ingest of another version or with other settings changes `samples`, so earlier ingests no longer count."""
    older = entries(("t", "version 7", "now"), ("t", "version 3", "now"), ("u", "version 1", "now"))
    assert select_last_versions(older, "now") == items_table([("t", "version 3"), ("u", "version 1")])
    other_settings = entries(("t", "version 7", "now"), ("t", "version 7", "other"))
    assert select_last_versions(other_settings, "now") == items_table([])
    assert select_last_versions(entries(), "now") == items_table([])

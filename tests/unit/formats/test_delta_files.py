"""Tests of Delta tables without Spark: folders with any name, and damaged logs."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import write_deltalake
from deltalake.exceptions import DeltaError

from pipelines.errors import UserError
from pipelines.formats.delta_files import (
    is_supported,
    local_folder,
    open_delta,
    open_or_create,
    query_rows,
    quoted_value,
    to_rows,
)
from pipelines.formats.table_schema import TIME_TYPE
from pipelines.formats.tables import DECISIONS


@pytest.mark.parametrize("name", ["h\u00f6me &y=1", "50% off", "a b+c;d,e", "{x,y}~'\"`", "$HOME!@(1)=*<>"])
def test_a_table_in_a_folder_with_an_unusual_name_is_written_and_read_inside_the_folder(
    tmp_path: Path, name: str
) -> None:
    folder = tmp_path / name / "decisions"
    assert is_supported(folder)
    table = open_or_create(folder, DECISIONS)
    names = ("decision_id", "model_name", "model_version", "action", "figures", "decided_by")
    row = {**dict.fromkeys(names, "birds"), "reasons": [], "decided_at": datetime.now(UTC)}
    write_deltalake(table, pa.Table.from_pylist([row], DECISIONS.arrow_schema), mode="append")
    assert query_rows(open_delta(folder), "model_name", "TRUE") == [{"model_name": "birds"}]
    assert [commit["version"] for commit in open_delta(folder).history()] == [1, 0]
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert len(list(folder.glob("*.parquet"))) == 1


@pytest.mark.parametrize("name", ["h[2]", "a]b", "back\\slash", "a^b", "a|b", "tab\t", "h %41", "home #1", "a?b"])
def test_a_folder_with_a_name_that_deltalake_does_not_support_is_refused_before_deltalake_opens_it(
    tmp_path: Path, name: str
) -> None:
    """For most folder names in these tests, deltalake 1.x ends the process or opens another folder."""
    assert not is_supported(tmp_path / name)
    with pytest.raises(DeltaError, match="only Spark can read"):
        open_delta(tmp_path / name)


def test_an_empty_newest_commit_is_reported_because_delta_would_read_the_table_without_its_rows(tmp_path: Path) -> None:
    """Source: https://github.com/ClickHouse/ClickHouse/issues/111738."""
    for _ in range(2):
        write_deltalake(tmp_path, pa.table({"a": [1, 2]}), mode="append")
    assert open_delta(tmp_path).version() == 1
    commit = tmp_path / "_delta_log" / f"{1:020}.json"
    commit.write_bytes(b"")
    with pytest.raises(UserError, match="the newest commit of a Delta table is an empty file"):
        open_delta(tmp_path)
    assert open_delta(tmp_path, version=0).version() == 0


def test_rows_of_a_table_have_the_values_that_pyarrow_returns_with_times_in_utc() -> None:
    noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    columns = {
        "utc": pa.array([noon, None], pa.timestamp("us", "UTC")),
        "local": pa.array([noon] * 2, pa.timestamp("us")),
    }
    table = pa.table(columns | {"texts": [[{"at": noon}], []], "n": [1, None]})
    assert to_rows(table) == table.to_pylist()
    assert to_rows(table)[0]["utc"].tzinfo is UTC
    assert to_rows(table.slice(0, 0)) == []


def test_a_query_reads_a_table_with_partitions(tmp_path: Path) -> None:
    write_deltalake(tmp_path / "a b", pa.table({"x": [1, 2], "s": ["c d", "e%"]}), partition_by=["s"])
    rows = query_rows(open_delta(tmp_path / "a b"), "x, s", "TRUE", "ORDER BY x")
    assert rows == [{"x": 1, "s": "c d"}, {"x": 2, "s": "e%"}]


def test_values_in_the_condition_of_a_query_select_equal_texts_and_times(tmp_path: Path) -> None:
    noon = datetime(2026, 1, 1, 12, 0, 0, 1, tzinfo=UTC)
    values = {"s": ["it's", 'a "b"', "it's"], "at": pa.array([noon, noon, noon.replace(year=1969)], TIME_TYPE)}
    write_deltalake(tmp_path, pa.table(values | {"n": [1, 2, 3]}))
    table = open_delta(tmp_path)
    for text, time, number in zip(values["s"], [noon, noon, noon.replace(year=1969)], [1, 2, 3], strict=True):
        condition = f"s = {quoted_value(text)} AND at = {quoted_value(time)}"
        assert query_rows(table, "n", condition) == [{"n": number}]


@pytest.mark.parametrize("name", ["a b", "50% off", "a&b;c", "h\u00f6me"])
def test_the_folder_of_a_table_is_found_from_its_url(tmp_path: Path, name: str) -> None:
    write_deltalake(tmp_path / name, pa.table({"a": [1]}))
    assert local_folder(open_delta(tmp_path / name)) == tmp_path / name

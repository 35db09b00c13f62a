"""Tests of Delta tables without Spark: folders with any name, and damaged logs."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import write_deltalake
from deltalake.exceptions import DeltaError

from pipelines.errors import UserError
from pipelines.formats.delta_files import arrow_dataset, is_supported, open_delta, open_or_create, to_rows
from pipelines.formats.tables import DECISIONS


@pytest.mark.parametrize("name", ["h\u00f6me #1 &?y=1", "50% off", "a b+c;d,e", "{x,y}~'\"`", "$HOME!@(1)=*<>"])
def test_a_table_in_a_folder_with_an_unusual_name_is_written_and_read_inside_the_folder(
    tmp_path: Path, name: str
) -> None:
    folder = tmp_path / name / "decisions"
    assert is_supported(folder)
    table = open_or_create(folder, DECISIONS)
    names = ("decision_id", "model_name", "model_version", "action", "figures", "decided_by")
    row = {**dict.fromkeys(names, "birds"), "reasons": [], "decided_at": datetime.now(UTC)}
    write_deltalake(table, pa.Table.from_pylist([row], DECISIONS.arrow_schema), mode="append")
    assert arrow_dataset(open_delta(folder)).to_table(["model_name"]).to_pylist() == [{"model_name": "birds"}]
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert len(list(folder.glob("*.parquet"))) == 1


@pytest.mark.parametrize("name", ["h[2]", "a]b", "back\\slash", "a^b", "a|b", "tab\t", "h %41"])
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

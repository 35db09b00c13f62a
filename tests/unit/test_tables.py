"""Tables are described once: keys are columns, types have SQL names, meanings survive the way into SQL."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from pyarrow.fs import LocalFileSystem

from pipelines.executor.ingest.decode import OUTCOME
from pipelines.formats.tables import QUARANTINE, REASONS, SAMPLES, TABLES, Table, files_of, sql_type
from vlm.errors import IMAGE_REASONS


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_a_table_is_well_formed(table: Table) -> None:
    assert len(set(table.names)) == len(table.names)
    assert set(table.key) <= set(table.names)
    nullable = {column.name for column in table.columns if column.nullable}
    assert nullable & set(table.key) <= {"slice"}, "a slice came later; null is the whole split, and merges know it"
    for column in table.columns:
        assert column.comment
        assert "'" not in column.comment, "it would end the SQL string it is written into"
        assert f"{column.name} {sql_type(column.type)}" in table.ddl()
    assert table.arrow_schema.names == table.names


def test_a_type_without_an_sql_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="no SQL type"):
        sql_type(pa.float16())


def test_every_reason_a_picture_can_be_refused_for_is_on_the_list() -> None:
    assert set(IMAGE_REASONS) < set(REASONS)
    assert len(set(REASONS)) == len(REASONS)


def test_what_executors_yield_has_the_types_of_the_tables_it_goes_to() -> None:
    types = {field.name: field.type for field in OUTCOME}
    for table in (SAMPLES, QUARANTINE):
        for column in table.columns:
            assert types.get(column.name, column.type) == column.type, f"{table.name}.{column.name}"


def test_a_table_is_read_by_arrow_alone_wherever_it_lies(tmp_path: Path) -> None:
    """A thread of Arrow's that has to ask Python aborts the process where the interpreter is about to end."""
    write_deltalake(tmp_path / "a b" / "t", pa.table({"x": [1, 2], "s": ["c d", "e%"]}), partition_by=["s"])
    found = files_of(DeltaTable(tmp_path / "a b" / "t"))
    assert isinstance(found.filesystem.base_fs, LocalFileSystem)
    assert sorted(found.to_table().to_pylist(), key=lambda row: row["x"]) == [{"x": 1, "s": "c d"}, {"x": 2, "s": "e%"}]

"""Tests of the table definitions: keys are columns, types have SQL names, and comments are valid in SQL."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pipelines.executor.ingest.outcome import OUTCOME
from pipelines.formats.table_schema import Table, sql_type
from pipelines.formats.tables import QUARANTINE, REASONS, SAMPLES, TABLES
from vlm.errors import IMAGE_REASONS


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_keys_types_and_comments_of_a_table_are_valid(table: Table) -> None:
    assert len(set(table.names)) == len(table.names)
    assert set(table.key) <= set(table.names)
    nullable = {column.name for column in table.columns if column.nullable}
    assert nullable & set(table.key) <= {"slice", "shards_where", "model_digest", "id_column", "image_column"}, (
        "these columns were added later, and merges compare them null-safe"
    )
    for column in table.columns:
        assert column.comment
        assert "'" not in column.comment, "a quote would end the SQL string of the comment"
        assert f"{column.name} {sql_type(column.type)}" in table.ddl()
    assert table.arrow_schema.names == table.names


def test_a_column_type_without_an_sql_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="no SQL type"):
        sql_type(pa.float16())


def test_every_reason_of_an_image_error_is_also_a_quarantine_reason() -> None:
    assert set(IMAGE_REASONS) < set(REASONS)
    assert len(set(REASONS)) == len(REASONS)


def test_the_columns_of_decoded_rows_have_the_same_types_as_the_table_columns_of_the_same_name() -> None:
    types = {field.name: field.type for field in OUTCOME}
    for table in (SAMPLES, QUARANTINE):
        for column in table.columns:
            assert types.get(column.name, column.type) == column.type, f"{table.name}.{column.name}"

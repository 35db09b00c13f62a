"""Remove the captions of rows that were deleted from a captioned table."""

from __future__ import annotations

from pyspark.sql import SparkSession

from pipelines.driver.caption.source_table import SourceTable
from pipelines.driver.delta.retry import retry_on_conflict
from pipelines.errors import StageFailed
from pipelines.formats.tables import GENERATED_CAPTIONS
from pipelines.platform import Platform


def remove_captions(spark: SparkSession, platform: Platform, source: SourceTable, id_column: str) -> int:
    """Remove captions of rows that the table no longer has. Return the number of removed captions.

    Captions whose ids are in another column of the table are kept.

    Raises:
        StageFailed: the table has no row. No caption is removed, because an empty table is usually the result of a
            failed export. The captions would take hours to generate again.
    """
    if source.ids.isEmpty():
        raise StageFailed(
            "the table to caption is empty, so no caption is removed",
            where=f"{source.name} version {source.version}",
            got="0 rows, and the option --remove-deleted",
            fix="check the job that fills the table; to remove all captions of the table, delete their rows from table "
            f"{GENERATED_CAPTIONS.name}",
        )
    name = platform.table(GENERATED_CAPTIONS.name)
    of_table = "old.source_table = {source_table} AND COALESCE(old.id_column, {id_column}) = {id_column}"
    merge = (
        f"MERGE INTO {name} old USING {{ids}} new ON {of_table} AND old.image_id = new.image_id "
        f"WHEN NOT MATCHED BY SOURCE AND {of_table} THEN DELETE"
    )

    def remove() -> int:
        done = spark.sql(merge, ids=source.ids, source_table=source.name, id_column=id_column).collect()
        return int(done[0]["num_deleted_rows"])

    return retry_on_conflict(remove, where=name)

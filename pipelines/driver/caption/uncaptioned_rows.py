"""Rows of a captioned table that have no caption by a model yet, or whose caption may be out of date."""

from __future__ import annotations

import logging
from typing import NamedTuple

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.driver.caption.pending_files import matches_key
from pipelines.driver.caption.source_table import SourceTable
from pipelines.driver.delta.model_rows import is_of_model
from pipelines.driver.delta.settings import FEW_ROWS
from pipelines.driver.model_files import ModelFiles
from pipelines.errors import UserError
from pipelines.executor.caption import UNREADABLE
from pipelines.formats.tables import GENERATED_CAPTIONS
from pipelines.platform import Platform

logger = logging.getLogger(__name__)


class RowCounts(NamedTuple):
    """Numbers of rows that meet the SQL condition of the request.

    Attributes:
        rows: all rows.
        todo: rows whose caption is missing or may be out of date.
    """

    rows: int
    todo: int


def captions_of_model(
    spark: SparkSession, platform: Platform, key: dict[str, str], columns: tuple[str, str], model: ModelFiles
) -> DataFrame:
    """Return the rows of `generated_captions` for the source table, its columns, the settings and the model."""
    table = spark.table(platform.table(GENERATED_CAPTIONS.name)).alias("old")
    return table.where(matches_key(key, columns)).where(is_of_model(model.digest, model.run_id))


def find_uncaptioned_rows(
    captions: DataFrame, source: SourceTable, id_column: str, *, retry_errors: bool
) -> tuple[DataFrame, RowCounts]:
    """Return rows that may need a caption, and row counts.

    A row may need a caption if it has none, or if its caption was made from another data file or from other columns. A
    row whose picture could not be read (UNREADABLE) may need one, because the picture may be readable now. With
    `retry_errors`, a row with an error counts as a row without a caption. If a condition selects the rows, several rows
    of the table may have the same id. The caption of such an id may belong to a row that the condition does not select,
    even in the same data file. Therefore a selected row whose id occurs several times may need a caption, too. The
    columns `known` and `known_error` have the SHA-256 and the error that the row's picture had when it was last
    captioned.

    Raises:
        UserError: the ids of the selected rows are not unique, or an id is null.
    """
    old = captions.where("error IS NULL") if retry_errors else captions
    captioned_from = F.col("source_file").alias("captioned_from")
    kept = F.when(F.col("source_file").startswith(UNREADABLE), UNREADABLE)  # caption of a picture that was unreadable
    result = F.col("sha256").alias("known"), F.coalesce("error", kept).alias("known_error")
    done = old.select("image_id", *result, captioned_from, F.lit(True).alias("is_done"))
    marked = source.rows.join(done, "image_id", "left")
    is_repeated = F.lit(False)
    if source.is_filtered:
        repeated = source.ids.groupBy("image_id").count().where("count > 1")
        marked = marked.join(repeated.select("image_id", F.lit(True).alias("is_repeated")), "image_id", "left")
        is_repeated = F.coalesce("is_repeated", F.lit(False))
    may_differ = is_repeated | ~F.col("captioned_from").eqNullSafe(F.col("source_file"))
    may_differ |= F.coalesce(F.col("known_error").startswith(UNREADABLE), F.lit(False))
    marked = marked.withColumn("may_differ", F.coalesce(F.col("is_done") & may_differ, F.lit(False)))
    counts = marked.agg(
        F.count("*").alias("rows"),
        F.count("image_id").alias("ids"),
        F.countDistinct("image_id").alias("distinct"),
        F.count_if(F.expr("is_done IS NULL OR may_differ")).alias("todo"),
        F.count_if(is_repeated).alias("repeated"),
    ).head()
    assert counts is not None
    if not counts["rows"] == counts["ids"] == counts["distinct"]:
        raise UserError(
            "the ids of the rows to caption are not unique",
            where=f"column {id_column} of table {source.name}",
            got=f"{counts['rows']} rows, {counts['ids']} non-null ids, {counts['distinct']} distinct ids",
            fix="choose a column with unique values (--id-column), or leave out rows with --where",
        )
    if counts["repeated"]:
        logger.warning(
            "%d of the rows to caption share their ids with further rows of %s: there is one caption per id, so the "
            "captions of such rows replace each other; use an id column with unique values",
            counts["repeated"],
            source.name,
        )
    todo = marked.where("is_done IS NULL OR may_differ")
    if counts["todo"] <= FEW_ROWS:
        # `marked` has the pictures of all rows, and the join that makes `marked` would shuffle the pictures. So Spark
        # joins only the ids of all rows, and sends the few ids that need a caption to the tasks that read the pictures.
        todo = source.rows.join(F.broadcast(todo.select("image_id", "known", "known_error")), "image_id")
    todo = todo.select("image_id", "image", "known", "known_error", "source_file")
    return todo, RowCounts(counts["rows"], counts["todo"])

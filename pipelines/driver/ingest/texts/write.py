"""Decode the rows of a plain text source, and write the rows to `quarantine` and `texts`.

The id of a text is a hash of its content, so a text that occurs twice in a source is stored once.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from pipelines.config import DataConfig
from pipelines.driver.delta.retry import retry_on_conflict
from pipelines.driver.delta.settings import bounded_batches
from pipelines.driver.delta.spark_errors import translate_spark_errors
from pipelines.driver.delta.versions import guarded_options, note_options, read_versions
from pipelines.driver.ingest.ledger import delete_from_ledger
from pipelines.driver.ingest.plan import PlanTotals, held_out_rank
from pipelines.driver.ingest.sources.source import Source
from pipelines.driver.ingest.spill import SpillFolder
from pipelines.driver.ingest.table_rows import TIME_COLUMNS, Stamp, rows_of_source, rows_to_add, verify_append
from pipelines.driver.ingest.totals import Written, require_usable_rows
from pipelines.executor.texts.decode import OUTCOME, TextRules, decode_texts
from pipelines.formats.table_schema import Table
from pipelines.formats.tables import QUARANTINE, TEXTS
from pipelines.platform import Platform

logger = logging.getLogger(__name__)


def write_texts(
    spark: SparkSession,
    platform: Platform,
    name: str,
    config: DataConfig,
    source: Source,
    *,
    spill: SpillFolder,
    refresh: bool,
) -> Written:
    """Decode the pending files of a source of plain text once, and write the decoded rows.

    If another ingest of the same source commits before this ingest writes, the decoded rows are compared with the
    tables again.

    Raises:
        UserError: no row is usable, and a refresh would remove all rows of the source.
    """
    assert source.rows is not None
    rules = TextRules(name, config.limits.max_text_chars, config.split)
    decode = partial(decode_texts, read=source.rows.read, rules=rules)
    with (
        translate_spark_errors("the input could not be ingested", where=config.source.where),
        bounded_batches(spark),
    ):
        outcomes = spill.materialize(source.rows.frame.mapInArrow(decode, from_arrow_schema(OUTCOME)), "outcomes")
        counts = outcomes.agg(F.count("*").alias("rows_in"), F.count("reason").alias("refused")).collect()[0].asDict()
        totals = PlanTotals(**counts, usable=counts["rows_in"] - counts["refused"])
        if refresh:
            require_usable_rows(totals, config)
            retry_on_conflict(partial(delete_from_ledger, spark, platform, name))
        before = rows_of_source(spark, platform, TEXTS.name, name).select("text_id")
        updated = _accepted(outcomes).join(before, "text_id", "left_semi").count() if refresh else 0
        stamp = Stamp(name, source.ingest_id, datetime.now(UTC), 0)
        append = partial(_append, num_rows=totals.rows_in)
        write = partial(_replace if refresh else append, spark, platform, stamp=stamp)
        reasons = retry_on_conflict(partial(write, QUARANTINE, _refused(outcomes)))
        new = retry_on_conflict(partial(write, TEXTS, _accepted(outcomes)))
    added = sum(new.values())
    return Written(totals=replace(totals, new=added, contributing=added), reasons=reasons, updated=updated)


def _accepted(outcomes: DataFrame) -> DataFrame:
    """Return one row per text. If the rows of a text have several splits, the text gets the first of test, val and
    train.
    """
    usable = outcomes.filter(F.col("reason").isNull()).groupBy("text_id", "sha256", "text")
    return usable.agg(F.min_by("split", held_out_rank("split")).alias("split"), F.min("source_row").alias("source_row"))


def _refused(outcomes: DataFrame) -> DataFrame:
    """Return the refused rows. Equal rows of a file count as one row."""
    refused = outcomes.filter(F.col("reason").isNotNull()).dropDuplicates(["source_row"])
    return refused.select("source_row", "payload", "stage", "reason", "detail")


def _append(
    spark: SparkSession, platform: Platform, table: Table, rows: DataFrame, *, stamp: Stamp, num_rows: int
) -> dict[str, int]:
    """In one commit, append the rows that a table lacks. Return the number of added rows by reason (`_count`).

    Args:
        spark: Spark session.
        platform: platform that stores the table.
        table: `texts` or `quarantine`.
        rows: accepted or refused rows of the input.
        stamp: values that all written rows share.
        num_rows: number of rows of the input.

    Raises:
        WriteConflict: another ingest of the source has committed since this function read the table.
    """
    name, source = platform.table(table.name), stamp.source
    version = read_versions(spark, platform, source, table).last_change
    key = TEXTS.key[0] if table is TEXTS else "source_row"
    known = rows_of_source(spark, platform, table.name, source).select(key)
    new = rows_to_add(rows, known, key, num_rows)
    counts = _count(new)
    if counts:
        _stamped(new, table, stamp).writeTo(name).options(**guarded_options(source, version)).append()
        verify_append(spark, platform, table, stamp, sum(counts.values()))
        logger.info("%d rows added to %s", sum(counts.values()), name)
    return counts


def _replace(spark: SparkSession, platform: Platform, table: Table, rows: DataFrame, *, stamp: Stamp) -> dict[str, int]:
    """In one commit, replace the source's rows in a table. Return the number of new rows by reason (`_count`)."""
    writer = _stamped(rows, table, stamp).writeTo(platform.table(table.name)).options(**note_options(stamp.source))
    writer.overwrite(F.col("source") == stamp.source)
    return _count(rows)


def _count(rows: DataFrame) -> dict[str, int]:
    """Count rows by reason. Rows of `texts` have no reason, and are counted under an empty string."""
    reason = F.col("reason") if "reason" in rows.columns else F.lit("")
    counts = rows.groupBy(reason.alias("reason")).count().orderBy(F.desc("count"), "reason").collect()
    return {row["reason"]: row["count"] for row in counts}


def _stamped(rows: DataFrame, table: Table, stamp: Stamp) -> DataFrame:
    """Convert rows to the columns of a table, with the values that all rows of an ingest share."""
    values = {"source": stamp.source, "ingest_id": stamp.ingest_id, TIME_COLUMNS[table.name]: stamp.planned_at}
    columns = {name: F.lit(value) for name, value in values.items()}
    if table is QUARANTINE:
        columns["replayed_at"] = F.lit(None).cast("timestamp")
    return rows.withColumns(columns).select(table.names)

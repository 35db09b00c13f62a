"""Ingest of plain text: read files into table `texts` and refused rows into `quarantine`, and account for every row.

An ingest of text keeps the same promises as an ingest of pictures (`driver.ingest.run`). The id of a text is a hash of
its content, so a text that is read twice is stored once. Each write is one Delta commit, in the order quarantine,
texts, ledger. An ingest that was killed between two commits is completed by the next one.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from pipelines.config import DataConfig
from pipelines.driver.delta.retry import retry_on_conflict
from pipelines.driver.delta.settings import bounded_batches
from pipelines.driver.delta.spark_errors import translate_spark_errors
from pipelines.driver.delta.tables import ensure_tables
from pipelines.driver.delta.versions import commit_note, read_versions, skip_if_changed_since, source_note
from pipelines.driver.ingest.ledger import (
    LedgerEntry,
    append_to_ledger,
    delete_from_ledger,
    hash_rules,
    items_table,
    read_ledger,
)
from pipelines.driver.ingest.near_duplicates import NearReport
from pipelines.driver.ingest.plan import held_out_rank
from pipelines.driver.ingest.sources.open import open_source
from pipelines.driver.ingest.sources.source import Source
from pipelines.driver.ingest.spill import spill_folder
from pipelines.driver.ingest.table_rows import TIME_COLUMNS, Stamp, count_rows, rows_of_source, verify_append
from pipelines.driver.ingest.totals import IngestReport, check_totals, describe_passed_over
from pipelines.errors import UserError
from pipelines.executor.texts.decode import OUTCOME, TextRules, decode_texts
from pipelines.formats.table_schema import Table
from pipelines.formats.tables import QUARANTINE, TEXTS
from pipelines.platform import Platform

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Written:
    """Counts of rows of an ingest: raw rows, new texts, refused rows, and rows added to quarantine by reason."""

    rows_in: int = 0
    new: int = 0
    refused: int = 0
    reasons: dict[str, int] = field(default_factory=dict)


def ingest_texts(
    spark: SparkSession, platform: Platform, source_name: str, config: DataConfig, *, refresh: bool = False
) -> IngestReport:
    """Add the new texts of a source of kind `text` to `texts` and `quarantine`.

    Args:
        spark: Spark session.
        platform: platform that stores the tables.
        source_name: name of the data config.
        config: data config of the source.
        refresh: whether to read all files again and replace all rows that the source has added before.

    Raises:
        UserError: the input does not exist, has no rows, or has no usable row.
        StageFailed: the row counts do not add up.
        TooManyRefused: more rows were refused than `data.limits.max_bad_share` allows. The tables nevertheless contain
            all rows of the ingest.
    """
    started = time.monotonic()
    retry_on_conflict(partial(ensure_tables, spark, platform))
    rules = hash_rules(config)
    ingested = items_table([]) if refresh else read_ledger(spark, platform, source_name, rules)
    source = open_source(spark, platform, source_name, config, ingested)
    replaced: dict[str, int] = {}
    if refresh:
        names = (TEXTS.name, QUARANTINE.name)
        replaced = {name: rows_of_source(spark, platform, name, source_name).count() for name in names}
        retry_on_conflict(partial(delete_from_ledger, spark, platform, source_name))
    written = _write(spark, platform, source_name, config, source, refresh=refresh) if source.rows else _Written()
    quarantined = sum(written.reasons.values())
    report = IngestReport(
        source=source_name,
        ingest_id=source.ingest_id,
        items=len(source.pending),
        unchanged=source.unchanged,
        rows_in=written.rows_in,
        new=written.new,
        merged=0,
        duplicates=written.rows_in - written.new - quarantined,
        quarantined=quarantined,
        refused=written.refused,
        reasons=written.reasons,
        removed=0,
        replaced=replaced,
        splits=count_rows(spark, platform, TEXTS, {"source": source_name}, by="split"),
        equal_pictures_across_splits=0,
        near_duplicates=NearReport(),
        dataset_version=read_versions(spark, platform, source_name, TEXTS).last_change,
        seconds=round(time.monotonic() - started, 3),
        **describe_passed_over(source.passed_over),
    )
    check_totals(report, config)
    if source.rows:  # written after the check, so that the next ingest reads the files of a failed ingest again
        entry = LedgerEntry(source_name, rules, source.ingest_id)
        retry_on_conflict(partial(append_to_ledger, spark, platform, source.pending, entry))
    return report


def _write(
    spark: SparkSession, platform: Platform, name: str, config: DataConfig, source: Source, *, refresh: bool
) -> _Written:
    """Decode the pending files once, and write the decoded rows. After a conflict, repeat only the write."""
    assert source.rows is not None
    rules = TextRules(name, config.limits.max_text_chars, config.split)
    decode = partial(decode_texts, read=source.rows.read, rules=rules)
    with (
        translate_spark_errors("the input could not be ingested", where=config.source.where),
        bounded_batches(spark),
        commit_note(spark, source_note(name)),
        spill_folder(platform) as spill,
    ):
        outcomes = spill.materialize(source.rows.frame.mapInArrow(decode, from_arrow_schema(OUTCOME)), "outcomes")
        counts = outcomes.agg(F.count("*").alias("rows_in"), F.count("reason").alias("refused")).collect()[0]
        if refresh and counts["rows_in"] == counts["refused"]:
            raise UserError(
                "a refresh would leave nothing: not one row of the input could be used",
                where=config.source.where,
                got=f"{counts['rows_in']} rows, all of them bad",
                fix="nothing was replaced; ingest without --refresh to write the bad rows to quarantine",
            )

        stamp = Stamp(name, source.ingest_id, datetime.now(UTC), 0)
        write = partial(_replace if refresh else _append, spark, platform, stamp=stamp)
        reasons = retry_on_conflict(partial(write, QUARANTINE, _refused(outcomes)))
        new = retry_on_conflict(partial(write, TEXTS, _accepted(outcomes)))
    return _Written(new=sum(new.values()), reasons=reasons, **counts.asDict())


def _accepted(outcomes: DataFrame) -> DataFrame:
    """Return one row per text. A text in several splits goes to the first of test, val and train."""
    usable = outcomes.filter(F.col("reason").isNull()).groupBy("text_id", "sha256", "text")
    return usable.agg(F.min_by("split", held_out_rank("split")).alias("split"), F.min("source_row").alias("source_row"))


def _refused(outcomes: DataFrame) -> DataFrame:
    """Return the refused rows. Equal rows of a file count as one row."""
    refused = outcomes.filter(F.col("reason").isNotNull()).dropDuplicates(["source_row"])
    return refused.select("source_row", "payload", "stage", "reason", "detail")


def _append(spark: SparkSession, platform: Platform, table: Table, rows: DataFrame, *, stamp: Stamp) -> dict[str, int]:
    """Append the rows that a table lacks in one commit. Return the number of added rows by reason (empty for texts).

    Raises:
        WriteConflict: another ingest of the source has committed since this function read the table.
    """
    name, source = platform.table(table.name), stamp.source
    version = read_versions(spark, platform, source, table).last_change
    key = TEXTS.key[0] if table is TEXTS else "source_row"
    known = rows_of_source(spark, platform, table.name, source).select(key)
    new = rows.join(known, key, "left_anti")
    counts = _count(new)
    if counts:
        with skip_if_changed_since(spark, source, version):
            _stamped(new, table, stamp).writeTo(name).append()
        verify_append(spark, platform, table, stamp, sum(counts.values()))
        logger.info("%d rows added to %s", sum(counts.values()), name)
    return counts


def _replace(spark: SparkSession, platform: Platform, table: Table, rows: DataFrame, *, stamp: Stamp) -> dict[str, int]:
    """Replace all rows of the source in a table in one commit. Return the number of rows by reason."""
    _stamped(rows, table, stamp).writeTo(platform.table(table.name)).overwrite(F.col("source") == stamp.source)
    return _count(rows)


def _count(rows: DataFrame) -> dict[str, int]:
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

"""Ingest stage: read a source, write accepted and refused rows to tables, and account for every row.

Pictures (`pictures/write.py`) and plain text (`texts/write.py`) differ only in how rows are decoded and written. An
ingest is idempotent: a second run, a run after a crash, or a concurrent run adds nothing twice.

- The id of a row contains a hash of the content of the row, so the row has the same id in every ingest.
- The plan looks up what the tables already contain. If the input has no new content, the ingest makes no new version of
  these tables, so shards that are pinned to the last version stay valid.
- If another ingest of the source commits after the plan was made, the plan is made again (`plan.py`).
- `quarantine` is written first, then `samples` or `texts`, and then the ledger (`ledger.py`). Each write is one Delta
  commit. If the process is killed between two writes, the next ingest reads every item that the ledger lacks. The next
  ingest skips the rows that the tables already have, and adds the missing rows.
"""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from functools import partial

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.config import DataConfig
from pipelines.driver.delta.retry import retry_on_conflict
from pipelines.driver.delta.spark_errors import translate_spark_errors
from pipelines.driver.delta.tables import ensure_tables
from pipelines.driver.delta.versions import read_versions
from pipelines.driver.ingest.ledger import (
    Ledger,
    LedgerEntry,
    append_to_ledger,
    forget_lost_items,
    has_other_rules,
    hash_rules,
    items_table,
)
from pipelines.driver.ingest.pictures.write import write_pictures
from pipelines.driver.ingest.sources.open import open_source
from pipelines.driver.ingest.sources.source import Source
from pipelines.driver.ingest.spill import SpillFolder, spill_folder
from pipelines.driver.ingest.table_rows import count_rows, rows_of_source, rows_with_keys_of
from pipelines.driver.ingest.texts.write import write_texts
from pipelines.driver.ingest.totals import (
    IngestReport,
    Written,
    check_totals,
    describe_passed_over,
    require_usable_rows,
    table_of_source,
)
from pipelines.formats.table_schema import Table
from pipelines.formats.tables import QUARANTINE, SAMPLES, TEXTS
from pipelines.platform import Platform

logger = logging.getLogger(__name__)


def ingest(
    spark: SparkSession, platform: Platform, source_name: str, config: DataConfig, *, refresh: bool = False
) -> IngestReport:
    """Add the new rows of a source to `samples` (plain text: to `texts`) and to `quarantine`.

    Args:
        spark: Spark session. Two concurrent ingests need two Spark sessions.
        platform: platform that stores the tables.
        source_name: name of the source, which is the name of its data config.
        config: data config of the source.
        refresh: whether to read all items again and replace all rows that earlier ingests of the source have added.

    Raises:
        UserError: the input is missing or lacks a column, or no row is usable (`check_totals`, `require_usable_rows`).
        StageFailed: Spark failed, or the row counts do not add up, because rows were lost or counted twice.
        TooManyRefused: more rows were refused than `data.limits.max_bad_share` allows. All rows have been written.
    """
    with spill_folder(platform) as spill:
        return _ingest(spark, platform, source_name, config, spill, refresh=refresh)


def _ingest(
    spark: SparkSession, platform: Platform, source_name: str, config: DataConfig, spill: SpillFolder, *, refresh: bool
) -> IngestReport:
    started, begun = time.monotonic(), datetime.now(UTC)
    retry_on_conflict(partial(ensure_tables, spark, platform))
    rules, table = hash_rules(config), table_of_source(config)
    ingested = items_table([]) if refresh else _ingested_items(spark, platform, source_name, rules, table)
    with translate_spark_errors("the input could not be opened", where=config.source.where):
        source = open_source(spark, platform, source_name, config, ingested, spill=spill)
    replaced = _announce_refresh(spark, platform, source_name, config, source) if refresh else {}
    write = write_texts if table is TEXTS else write_pictures
    written = Written()
    if source.rows:
        written = write(spark, platform, source_name, config, source, spill=spill, refresh=refresh)
    totals, quarantined = written.totals, sum(written.reasons.values())
    versions = read_versions(spark, platform, source_name, table)
    report = IngestReport(
        source=source_name,
        ingest_id=source.ingest_id,
        items=source.num_pending,
        unchanged=source.unchanged,
        rows_in=totals.rows_in,
        new=totals.new - written.updated,
        updated=written.updated,
        merged=totals.contributing - totals.new,
        duplicates=totals.usable - totals.contributing + totals.bad - quarantined,
        quarantined=quarantined,
        refused=totals.bad,
        reasons=written.reasons,
        removed=written.removed,
        replaced=replaced,
        splits=count_rows(spark, platform, table, {"source": source_name}, by="split"),
        equal_pictures_across_splits=written.across,
        pictures_of_other_splits=written.other_splits,
        near_duplicates=written.near,
        dataset_version=versions.last_change,
        seconds=round(time.monotonic() - started, 3),
        **describe_passed_over(source.passed_over, source.passed_over_count),
        unreadable_files=written.unreadable,
    )
    if report.new and table is SAMPLES and not refresh and has_other_rules(spark, platform, source_name, rules):
        _warn_of_other_ids(spark, platform, source_name, begun, report.new)
    check_totals(report, config)
    if source.rows:  # if the check has failed, the ledger lacks the items, so the next ingest reads them again
        refused = read_versions(spark, platform, source_name, QUARANTINE)[1:] if totals.bad else ()
        entry = LedgerEntry(source_name, rules, source.ingest_id, *versions[1:], *refused)
        retry_on_conflict(partial(append_to_ledger, spark, platform, source.pending, entry))
    return report


def _ingested_items(spark: SparkSession, platform: Platform, name: str, rules: str, table: Table) -> Ledger:
    """Return the items of the source that need not be read again. Their rows are in `table` and `quarantine`."""
    retry_on_conflict(partial(forget_lost_items, spark, platform, name, table))
    return Ledger(spark, platform, name, rules)


def _announce_refresh(
    spark: SparkSession, platform: Platform, name: str, config: DataConfig, source: Source
) -> dict[str, int]:
    """Count the rows of each table that the refresh will replace, and log the counts.

    Raises:
        UserError: the input has no row.
    """
    if not source.rows:
        require_usable_rows(Written().totals, config)
    table = table_of_source(config)
    replaced = {each: rows_of_source(spark, platform, each, name).count() for each in (table.name, QUARANTINE.name)}
    logger.info(
        "the refresh of %s reads %d files or rows of captions again. It replaces %d rows in %s and %d in quarantine",
        *(name, source.num_pending, replaced[table.name], table.name, replaced[QUARANTINE.name]),
    )
    return replaced


def _warn_of_other_ids(spark: SparkSession, platform: Platform, name: str, begun: datetime, num_new: int) -> None:
    """Warn if an earlier ingest with other settings has stored pictures of this ingest under other ids.

    One possible cause is an id column that was added to the config after the earlier ingest. The pictures of the
    earlier ingest stay in `samples`, and may be in another split than the new pictures.
    """
    count = stored_again(rows_of_source(spark, platform, SAMPLES.name, name), begun, num_new).count()
    if count:
        logger.warning(
            "%d pictures of %s are in samples under several ids, because the settings of the source have changed since "
            "an earlier ingest. To replace all pictures of the source, run `lakesight ingest --refresh`",
            count,
            name,
        )


def stored_again(pictures: DataFrame, begun: datetime, num_new: int) -> DataFrame:
    """Return the hashes (column sha256) of new pictures whose bytes an earlier ingest has stored too.

    Args:
        pictures: rows of one source in `samples`.
        begun: time before the new pictures were stored, and after all other pictures were stored.
        num_new: number of new pictures.
    """
    new = pictures.filter(F.col("ingested_at") >= F.lit(begun)).select("sha256")
    hashes = rows_with_keys_of(pictures.select("sha256", "ingested_at"), new, "sha256", num_new)
    times = hashes.groupBy("sha256").agg(F.min("ingested_at").alias("first"), F.max("ingested_at").alias("last"))
    return times.filter((F.col("first") < F.lit(begun)) & (F.col("last") >= F.lit(begun))).select("sha256")

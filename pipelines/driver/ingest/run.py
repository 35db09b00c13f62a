"""Ingest stage: read a source of pictures and texts into `samples` and `quarantine`, and account for every row.

Executors decode pictures (`pipelines.executor.ingest.decode`). The driver makes the ingest plan from narrow columns,
and commits the writes. Pictures never reach the driver. An ingest is idempotent: a second run, a run after a crash, or
a concurrent run adds nothing twice.

- The id of a row contains a hash of the content of the row, so the row has the same id in every ingest.
- The plan looks up what the tables already contain. If the input has no new content, the ingest writes to no table and
  makes no table version, so shards that are pinned to the last version stay valid.
- If another ingest of the source commits after the plan was made, the plan is made again (`plan.py`).
- `quarantine` is written first, then `samples`, and then the ledger (`ledger.py`). Each write is one Delta commit. If
  the process is killed between two writes, the next run reads every item that the ledger lacks, skips rows that the
  tables already have, and adds the missing rows.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial

from pyspark.sql import SparkSession

from pipelines.config import DataConfig
from pipelines.driver.delta.retry import retry_on_conflict
from pipelines.driver.delta.tables import ensure_tables
from pipelines.driver.delta.versions import read_versions
from pipelines.driver.ingest.commit import remove_gone, write_samples
from pipelines.driver.ingest.decode import DecodedRows, IngestRequest, decode_rows
from pipelines.driver.ingest.ledger import (
    LedgerEntry,
    append_to_ledger,
    delete_from_ledger,
    hash_rules,
    items_table,
    read_ledger,
)
from pipelines.driver.ingest.near_duplicates import NearReport
from pipelines.driver.ingest.plan import PlanTotals, count_pictures_across_splits, plan_ingest
from pipelines.driver.ingest.quarantine import add_to_quarantine, name_unreadable_files, replace_quarantine
from pipelines.driver.ingest.sources.open import open_source
from pipelines.driver.ingest.sources.source import Covered, Source
from pipelines.driver.ingest.table_rows import count_rows, rows_of_source
from pipelines.driver.ingest.totals import NAMED_FILES, IngestReport, check_totals, describe_passed_over
from pipelines.errors import UserError
from pipelines.formats.tables import QUARANTINE, SAMPLES
from pipelines.platform import Platform

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """Counts of one write to `quarantine` and `samples`.

    Attributes:
        totals: row counts and picture counts of the plan.
        reasons: number of rows added to `quarantine`, by quarantine reason.
        near: counts of near duplicates among the new pictures.
        across: number of pictures whose bytes occur in two splits of the source.
        removed: number of pictures removed from `samples`.
        unreadable: names of files that could not be read to their end, with the reasons; at most NAMED_FILES.
    """

    totals: PlanTotals = field(default_factory=PlanTotals)
    reasons: dict[str, int] = field(default_factory=dict)
    near: NearReport = field(default_factory=NearReport)
    across: int = 0
    removed: int = 0
    unreadable: list[str] = field(default_factory=list)


def ingest(
    spark: SparkSession, platform: Platform, source_name: str, config: DataConfig, *, refresh: bool = False
) -> IngestReport:
    """Add the new rows of a source to `samples` and `quarantine`.

    Args:
        spark: Spark session. Two concurrent ingests need two Spark sessions.
        platform: platform that stores the tables.
        source_name: name of the source, which is the name of its data config.
        config: data config of the source.
        refresh: whether to read all items again and replace all rows that the source has added before.

    Raises:
        UserError: the input does not exist, lacks a column, has no rows, or has no usable row. Unusable rows are
            written to `quarantine`.
        StageFailed: the row counts do not add up, because rows were lost or counted twice.
        TooManyRefused: more rows were refused than `data.limits.max_bad_share` allows. The tables nevertheless contain
            all rows of the ingest.
    """
    started = time.monotonic()
    retry_on_conflict(partial(ensure_tables, spark, platform))
    rules = hash_rules(config)
    ingested = items_table([]) if refresh else read_ledger(spark, platform, source_name, rules)
    source = open_source(spark, platform, source_name, config, ingested)
    replaced = _start_refresh(spark, platform, source_name, source) if refresh else {}
    written = _ingest_rows(spark, platform, source_name, config, source, refresh=refresh)
    totals, quarantined = written.totals, sum(written.reasons.values())
    report = IngestReport(
        source=source_name,
        ingest_id=source.ingest_id,
        items=len(source.pending),
        unchanged=source.unchanged,
        rows_in=totals.rows_in,
        new=totals.new,
        merged=totals.contributing - totals.new,
        duplicates=totals.usable - totals.contributing + totals.bad - quarantined,
        quarantined=quarantined,
        refused=totals.bad,
        reasons=written.reasons,
        removed=written.removed,
        replaced=replaced,
        splits=count_rows(spark, platform, SAMPLES, {"source": source_name}, by="split"),
        equal_pictures_across_splits=written.across,
        near_duplicates=written.near,
        dataset_version=read_versions(spark, platform, source_name).last_change,
        seconds=round(time.monotonic() - started, 3),
        **describe_passed_over(source.passed_over),
        unreadable_files=written.unreadable,
    )
    check_totals(report, config)
    if source.rows:  # not reached if the check fails, so the next ingest reads these items again
        entry = LedgerEntry(source_name, rules, source.ingest_id)
        retry_on_conflict(partial(append_to_ledger, spark, platform, source.pending, entry))
    return report


def _start_refresh(spark: SparkSession, platform: Platform, name: str, source: Source) -> dict[str, int]:
    """Delete the ledger rows of the source, and count the rows of each table that the refresh will replace."""
    tables = (SAMPLES.name, QUARANTINE.name)
    replaced = {table: rows_of_source(spark, platform, table, name).count() for table in tables}
    logger.info(
        "the refresh of %s reads %d files or rows of captions again and replaces %d pictures in samples and %d rows in "
        "quarantine",
        *(name, len(source.pending), *replaced.values()),
    )
    retry_on_conflict(partial(delete_from_ledger, spark, platform, name))
    return replaced


def _ingest_rows(
    spark: SparkSession, platform: Platform, name: str, config: DataConfig, source: Source, *, refresh: bool
) -> Written:
    """Decode the pending rows of a source, and write the decoded rows. After a conflict, make a new plan."""
    if source.rows is None:
        return Written()
    request = IngestRequest(name, config, source.rows, source.ingest_id, replace=refresh)
    reasons: Counter[str] = Counter()
    with decode_rows(spark, platform, request) as decoded:
        covered = None if refresh else source.covered
        unusable = covered and covered.image_ids is None and decoded.refused == decoded.rows_in > 0
        removed = 0
        if covered and not unusable:
            removed = retry_on_conflict(partial(remove_gone, platform, decoded, covered))
        written = retry_on_conflict(partial(_plan_and_write, spark, platform, decoded, reasons))
        if covered and unusable:
            _require_no_pictures(spark, platform, decoded, covered)
        return replace(written, removed=removed)


def _plan_and_write(spark: SparkSession, platform: Platform, decoded: DecodedRows, reasons: Counter[str]) -> Written:
    """Make a plan and write its rows to `quarantine` and `samples`.

    `reasons` counts the rows that all attempts have added to `quarantine`, because these rows stay in `quarantine` if
    the following write to `samples` fails.
    """
    plan = plan_ingest(spark, platform, decoded)
    if plan.request.replace:
        _require_usable_rows(plan.totals, plan.request.config)
        reasons.clear()
        reasons.update(replace_quarantine(platform, plan))
    elif plan.totals.bad:
        reasons.update(add_to_quarantine(platform, plan))
    near = write_samples(platform, plan)
    hashed = plan.request.config.split.kind == "hash"
    across = 0 if hashed else count_pictures_across_splits(plan.outcomes)
    unreadable = name_unreadable_files(plan, NAMED_FILES) if plan.totals.refused else []
    return Written(totals=plan.totals, reasons=dict(reasons), near=near, across=across, unreadable=unreadable)


def _require_no_pictures(spark: SparkSession, platform: Platform, decoded: DecodedRows, covered: Covered) -> None:
    """Raise an error if no row of a table was usable and `samples` still has pictures of the table."""
    source, config = decoded.request.source, decoded.request.config
    if not covered.select(rows_of_source(spark, platform, SAMPLES.name, source)).isEmpty():
        raise UserError(
            "not one row of the table could be used, so the pictures of earlier ingests were kept",
            where=config.source.where,
            got=f"all {decoded.rows_in} rows are bad",
            fix="inspect the refused rows with `lakesight quarantine`, and check data.source.columns",
        )


def _require_usable_rows(totals: PlanTotals, config: DataConfig) -> None:
    if not totals.usable:
        raise UserError(
            "a refresh would remove all rows of the source, because not one row of the input can be used",
            where=config.source.where,
            got=f"{totals.bad} of {totals.rows_in} rows are bad",
            fix="ingest without --refresh, which writes the bad rows to quarantine; this refresh has replaced nothing",
        )

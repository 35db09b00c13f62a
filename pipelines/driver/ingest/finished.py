"""Check without Spark whether an ingest has nothing to read. Spark starts only if there may be rows to read.

The check reads the ledger (table `ingested`), the list of the source's files and the Delta logs. If the check is not
certain that all items were ingested, Spark starts and opens the source. The check is not certain if a catalog manages
the tables, or if only Spark can read the source. The check is also not certain if a table does not exist yet, or was
written by an earlier version of Lakesight.
"""

from __future__ import annotations

import time

from pipelines.config import DataConfig
from pipelines.driver.delta.on_disk import count_on_disk
from pipelines.driver.delta.tables import open_tables
from pipelines.driver.delta.versions import read_versions_of_files
from pipelines.driver.ingest.ledger import has_lost_items, hash_rules, read_ledger_of_files
from pipelines.driver.ingest.near_duplicates import NearReport
from pipelines.driver.ingest.report import FullReport, find_report
from pipelines.driver.ingest.sources.open import needs_spark, open_unchanged
from pipelines.driver.ingest.totals import IngestReport, describe_passed_over, table_of_source
from pipelines.formats.tables import INGESTED, QUARANTINE
from pipelines.platform import Platform


def find_finished(platform: Platform, source_name: str, config: DataConfig) -> FullReport | None:
    """Return the report of the ingest if there is nothing to read, or None if there may be rows to read.

    Raises:
        UserError: the input does not exist, has no file of the source's kind, or lacks a column.
    """
    started = time.monotonic()
    filled = table_of_source(config)
    tables = open_tables(platform, filled, QUARANTINE, INGESTED)
    if tables is None:
        return None
    if has_lost_items(tables[INGESTED.name], tables[filled.name], tables[QUARANTINE.name], source_name):
        return None
    if needs_spark(config):  # the ledger of a large source may have too many rows for the driver
        return None
    ingested = read_ledger_of_files(tables[INGESTED.name], source_name, hash_rules(config))
    source = open_unchanged(platform, source_name, config, ingested)
    if source is None:
        return None
    report = IngestReport(
        source=source_name,
        ingest_id=source.ingest_id,
        items=0,
        unchanged=source.unchanged,
        rows_in=0,
        new=0,
        merged=0,
        duplicates=0,
        quarantined=0,
        refused=0,
        reasons={},
        removed=0,
        replaced={},
        splits=count_on_disk(tables[filled.name], {"source": source_name}, by="split"),
        equal_pictures_across_splits=0,
        near_duplicates=NearReport(),
        dataset_version=read_versions_of_files(tables[filled.name], source_name).last_change,
        seconds=round(time.monotonic() - started, 3),
        **describe_passed_over(source.passed_over, source.passed_over_count),
    )
    return find_report(platform, report)

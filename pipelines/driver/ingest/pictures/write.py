"""Decode the pictures of a source, and write the rows to `quarantine` and `samples`.

Executors decode pictures (`pipelines.executor.ingest.decode`). The driver makes the ingest plan from small columns,
such as ids and hashes, and commits the writes. Pictures never reach the driver.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

from pyspark.sql import SparkSession

from pipelines.config import DataConfig
from pipelines.driver.delta.retry import retry_on_conflict
from pipelines.driver.ingest.commit import write_samples
from pipelines.driver.ingest.decode import DecodedRows, IngestRequest, decode_rows
from pipelines.driver.ingest.ledger import delete_from_ledger
from pipelines.driver.ingest.pictures.gone import count_unusable, has_no_usable_row, remove_gone, require_no_pictures
from pipelines.driver.ingest.plan import count_pictures_across_splits, count_pictures_of_other_splits, plan_ingest
from pipelines.driver.ingest.quarantine import (
    add_to_quarantine,
    name_unreadable_files,
    reopen_replayed,
    replace_quarantine,
)
from pipelines.driver.ingest.sources.source import Source
from pipelines.driver.ingest.sources.walk import NAMED_FILES
from pipelines.driver.ingest.spill import SpillFolder
from pipelines.driver.ingest.table_rows import rows_of_source
from pipelines.driver.ingest.totals import Written, require_usable_rows
from pipelines.formats.tables import SAMPLES
from pipelines.platform import Platform


def write_pictures(
    spark: SparkSession,
    platform: Platform,
    name: str,
    config: DataConfig,
    source: Source,
    *,
    spill: SpillFolder,
    refresh: bool,
) -> Written:
    """Decode the pending rows of a source of pictures, and write them to `quarantine` and `samples`.

    If another ingest of the same source commits between plan and write, the plan is made again, from the same decoded
    pictures.

    Raises:
        UserError: no row is usable, and either `refresh` is true, or all pictures of the source table would be removed.
        StageFailed: Spark failed, or every write conflicted with another ingest.
    """
    assert source.rows is not None
    request = IngestRequest(name, config, source.rows, source.ingest_id, replace=refresh)
    reasons: Counter[str] = Counter()
    with decode_rows(spark, platform, request, spill) as decoded:
        covered = None if refresh else source.covered
        removed, keeps_all = 0, False
        if covered:
            unusable = count_unusable(decoded)
            keeps_all = has_no_usable_row(spark, platform, decoded, covered, unusable)
            if not keeps_all:
                removed = retry_on_conflict(partial(remove_gone, platform, decoded, covered, unusable))
        written = retry_on_conflict(partial(_plan_and_write, spark, platform, decoded, reasons))
        if covered and keeps_all:
            require_no_pictures(spark, platform, decoded, covered)
        return replace(written, removed=removed)


def _plan_and_write(spark: SparkSession, platform: Platform, decoded: DecodedRows, reasons: Counter[str]) -> Written:
    """Make a plan and write its rows to `quarantine` and `samples`.

    `reasons` counts the rows that all attempts together have added to `quarantine`. Rows stay in `quarantine` even if
    the attempt that added them fails to write to `samples`.
    """
    plan = plan_ingest(spark, platform, decoded)
    updated = 0
    if plan.request.replace:
        require_usable_rows(plan.totals, plan.request.config)
        delete_from_ledger(spark, platform, plan.stamp.source)
        reasons.clear()
        reasons.update(replace_quarantine(platform, plan))
        before = rows_of_source(spark, platform, SAMPLES.name, plan.stamp.source).select("image_id")
        updated = plan.pictures.filter("NOT conflicting").join(before, "image_id", "left_semi").count()
    elif plan.totals.bad:
        reasons.update(add_to_quarantine(platform, plan))
    near = write_samples(platform, plan)
    if plan.totals.refused and not plan.request.replace:
        retry_on_conflict(partial(reopen_replayed, platform, plan))
    hashed = plan.request.config.split.kind == "hash"
    across = 0 if hashed else count_pictures_across_splits(plan.outcomes)
    other_splits = 0 if hashed else count_pictures_of_other_splits(plan.pictures)
    unreadable = name_unreadable_files(plan, NAMED_FILES) if plan.totals.refused else []
    written = Written(
        totals=plan.totals,
        reasons=dict(reasons),
        near=near,
        across=across,
        other_splits=other_splits,
        unreadable=unreadable,
    )
    return replace(written, updated=updated)

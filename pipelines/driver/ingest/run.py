"""Ingest: a source of pictures and texts into `samples` and `quarantine`, every row accounted for.

Executors decode (`pipelines.executor.ingest.decode`); the driver plans from narrow columns and merges. Pictures never
come to the driver. What makes a second run, a run after a crash, or a run beside another one add nothing:

- ids come from content, so the same row is the same row wherever and whenever it is read;
- what is already in the tables is looked up first, and with nothing new nothing is written, not even an empty version
  (shards pinned to the last version stay found);
- a plan that was overtaken by another ingest is made again (`pipelines.driver.ingest.decode`);
- refusals are written before samples, and the ledger last (`pipelines.driver.ingest.ledger`), each in one Delta commit.
  Killed in between, the next run reads again what the ledger lacks, finds what is there, and brings the rest.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from pipelines.config import DataConfig
from pipelines.driver.delta.retry import undisturbed
from pipelines.driver.delta.tables import ensure_tables
from pipelines.driver.delta.versions import commit_note, note_of, versions
from pipelines.driver.ingest.commit import add_samples, remove_samples, replace_samples, rows_of_source
from pipelines.driver.ingest.decode import Task, Work, settled
from pipelines.driver.ingest.ledger import Entry, forget, items_of, rules_of, take_note, taken_in
from pipelines.driver.ingest.near_duplicates import (
    NearReport,
    looks_of,
    neighbours_of,
    pairs_of,
    report_of,
    shared_keys,
)
from pipelines.driver.ingest.plan import Totals, pictures_across_splits
from pipelines.driver.ingest.quarantine import quarantine, replace_quarantine
from pipelines.driver.ingest.sources import Source, open_source
from pipelines.driver.ingest.totals import IngestReport, checked
from pipelines.errors import UserError
from pipelines.formats.tables import QUARANTINE, SAMPLES
from pipelines.platform import Platform

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Came:
    """What one reading of a source came to.

    Attributes:
        totals: of its rows.
        reasons: rows newly in `quarantine`, by reason.
        near: near duplicates among the new pictures.
        across: pictures with the same bytes in two splits.
        removed: pictures taken out of `samples`.
    """

    totals: Totals = field(default_factory=Totals)
    reasons: dict[str, int] = field(default_factory=dict)
    near: NearReport = field(default_factory=NearReport)
    across: int = 0
    removed: int = 0


def ingest(
    spark: SparkSession, platform: Platform, source_name: str, config: DataConfig, *, refresh: bool = False
) -> IngestReport:
    """Bring what is new of a source into `samples` and `quarantine`.

    Args:
        spark: the session; of two ingests at the same time each needs its own.
        platform: where the tables are.
        source_name: the data config's name.
        config: the data config.
        refresh: read everything, and put it in the place of all that the source has brought before.

    Raises:
        UserError: no such input, a missing column, no rows, or not one row that can be used (they are in `quarantine`).
        StageFailed: the rows do not add up: some were lost or doubled on the way.
        TooManyRefused: more of them than `data.limits.max_bad_share` allows; everything is written then.
    """
    started = time.monotonic()
    undisturbed(partial(ensure_tables, spark, platform))
    rules = rules_of(config)
    taken = items_of([]) if refresh else taken_in(spark, platform, source_name, rules)
    source = open_source(spark, platform, source_name, config, taken)
    replaced = _announced(spark, platform, source_name, source) if refresh else {}
    came = _brought(spark, platform, source_name, config, source, refresh=refresh)
    totals, quarantined = came.totals, sum(came.reasons.values())
    report = IngestReport(
        source=source_name,
        ingest_id=source.ingest_id,
        items=len(source.fresh),
        unchanged=source.unchanged,
        rows_in=totals.rows_in,
        new=totals.new,
        merged=totals.brought - totals.new,
        duplicates=totals.usable - totals.brought + totals.bad - quarantined,
        quarantined=quarantined,
        refused=totals.bad,
        reasons=came.reasons,
        removed=came.removed,
        replaced=replaced,
        splits=splits_of(spark, platform, source_name),
        equal_pictures_across_splits=came.across,
        near_duplicates=came.near,
        dataset_version=versions(spark, platform, source_name).changed,
        seconds=round(time.monotonic() - started, 3),
    )
    checked(report, config)
    if source.rows:  # only now: what ends red is read again, and is red again
        entry = Entry(source_name, rules, source.ingest_id)
        undisturbed(partial(take_note, spark, platform, source.fresh, entry))
    return report


def take(platform: Platform, work: Work, config: DataConfig, *, refresh: bool = False) -> NearReport:
    """Write what the plan says is good into `samples`, near duplicates on one side of the split.

    Raises:
        Overtaken: another ingest of the source was faster; nothing is written.
    """
    write = replace_samples if refresh else add_samples
    if not work.totals.brought:
        return NearReport()
    if not (work.totals.new and config.near_duplicates):
        nobody = work.plan.withColumn("near_of", F.lit(None).cast("string"))
        write(platform, work.waiting, nobody, work.stamp, work.totals)
        return NearReport()
    looks = looks_of(work.plan, work.known)
    shared = work.waiting.keep(shared_keys(looks), "shared")
    pairs = work.waiting.keep(pairs_of(shared, looks), "pairs")
    neighbours = work.waiting.keep(neighbours_of(pairs, move=config.split.kind == "hash"), "neighbours")
    beside = work.plan.join(neighbours.drop("split"), "image_id", "left")
    plan = beside.withColumn("split", F.coalesce("near_split", "split"))
    write(platform, work.waiting, plan, work.stamp, work.totals)
    return report_of(shared, pairs, neighbours)


def splits_of(spark: SparkSession, platform: Platform, source: str) -> dict[str, int]:
    """Pictures of a source in `samples`, by split."""
    counts = rows_of_source(spark, platform, SAMPLES.name, source).groupBy("split").count()
    return {row["split"]: row["count"] for row in sorted(counts.collect())}


def _announced(spark: SparkSession, platform: Platform, name: str, source: Source) -> dict[str, int]:
    """How many rows of each table a refresh will replace; from here on no item counts as taken in."""
    tables = (SAMPLES.name, QUARANTINE.name)
    replaced = {table: rows_of_source(spark, platform, table, name).count() for table in tables}
    logger.info(
        "refresh of %s: reads %d files or rows of captions again, and puts what they hold in the place of %d pictures "
        "in samples and %d rows in quarantine",
        *(name, len(source.fresh), *replaced.values()),
    )
    undisturbed(partial(forget, spark, platform, name))
    return replaced


def _brought(
    spark: SparkSession, platform: Platform, name: str, config: DataConfig, source: Source, *, refresh: bool
) -> Came:
    """Read what is to be read, and write it."""
    if source.rows is None:
        return Came()
    removed = 0
    if source.gone is not None:
        with commit_note(spark, note_of(name)):
            removed = undisturbed(partial(remove_samples, spark, platform, name, source.gone))
    reasons: Counter[str] = Counter()  # of all tries: what is in quarantine stays there

    def act(work: Work) -> Came:
        totals = work.totals
        if refresh:
            _demand_something(totals, config)
            reasons.clear()
            reasons.update(replace_quarantine(platform, work))
        elif totals.bad:
            reasons.update(quarantine(platform, work))
        near = take(platform, work, config, refresh=refresh)
        across = pictures_across_splits(work.outcomes) if config.split.kind != "hash" else 0
        return Came(totals=totals, reasons=dict(reasons), near=near, across=across, removed=removed)

    task = Task(name, config, source.rows, source.ingest_id, afresh=refresh)
    return settled(spark, platform, task, act)


def _demand_something(totals: Totals, config: DataConfig) -> None:
    if not totals.usable:
        raise UserError(
            "a refresh would leave nothing: not one row of the input could be used",
            where=config.source.where,
            got=f"{totals.rows_in} rows, {totals.bad} of them bad",
            fix="nothing was replaced; ingest without --refresh to have the bad rows in quarantine",
        )

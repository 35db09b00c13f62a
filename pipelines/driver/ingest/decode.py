"""The work on a source's rows: decoded once by executors, planned by the driver, and settled against the tables.

Pictures never pass through Spark but on their way into the table: until then they wait in files (`executor.staging`).

Two ingests of a source may run at the same time. Delta's commits are atomic, a plan is not: what it calls new may have
come meanwhile. So a plan is only good as long as no other ingest of its source commits (`session.since`); one that was
overtaken, or met another commit half-way, writes nothing and is made again. What was decoded is kept.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

from pyarrow import RecordBatch
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.pandas.types import from_arrow_schema

from pipelines.config import DataConfig
from pipelines.driver.delta.failures import spark_failures, worker_died
from pipelines.driver.delta.retry import undisturbed
from pipelines.driver.delta.settings import bounded_batches
from pipelines.driver.delta.tables import add_columns
from pipelines.driver.delta.versions import commit_note, note_of, versions
from pipelines.driver.ingest.commit import Stamp, rows_of_source
from pipelines.driver.ingest.plan import Totals, counted, plan_of, totals_of
from pipelines.driver.ingest.sources import Rows
from pipelines.driver.ingest.spill import Waiting, waiting_rows
from pipelines.executor.ingest.decode import Rules, decode_batches, decode_guarded
from pipelines.executor.ingest.spill import NARROW, staged
from pipelines.formats.tables import SAMPLES
from pipelines.platform import Platform

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Task:
    """What is to be worked on.

    Attributes:
        source: name of the data config.
        config: the data config.
        rows: what executors read.
        ingest_id: what rows that are written carry.
        afresh: plan as if nothing of the source were in `samples`, because what is there will be replaced.
    """

    source: str
    config: DataConfig
    rows: Rows
    ingest_id: str
    afresh: bool = False


@dataclass(frozen=True)
class Work:
    """Rows that were decoded and what is to become of them.

    Attributes:
        outcomes: one row (`staging.NARROW`) a row that came.
        waiting: their pictures and payloads.
        known: rows of the source in `samples`.
        plan: one row a picture (`plan.plan_of`).
        totals: of both.
        rules: what made a row a sample.
        stamp: what every row that is written carries.
    """

    outcomes: DataFrame
    waiting: Waiting
    known: DataFrame
    plan: DataFrame
    totals: Totals
    rules: Rules
    stamp: Stamp


def settled(spark: SparkSession, platform: Platform, task: Task, act: Callable[[Work], Result]) -> Result:
    """Decode rows, plan what becomes of them, and act on the plan; again from the plan on if others were faster.

    Args:
        spark: the session.
        platform: where the tables are.
        task: what is to be worked on.
        act: writes into the tables; what it commits to `samples` is bound to the plan (`merge`).

    Raises:
        StageFailed: Spark failed, here or in `act`, or others were faster time and again.
    """
    add_columns(spark, platform, SAMPLES)
    config = task.config
    rules = Rules(task.source, config.source.record_columns, config.limits, config.split, config.near_duplicates)
    with (
        spark_failures("the input could not be ingested", where=config.source.where),
        bounded_batches(spark),
        commit_note(spark, note_of(task.source)),
        waiting_rows(platform) as waiting,
    ):
        outcomes = _survived(task.rows, rules, waiting)
        came = counted(outcomes)

        def planned() -> Result:
            stamp = Stamp(
                task.source, task.ingest_id, datetime.now(UTC), versions(spark, platform, task.source).changed
            )
            known = rows_of_source(spark, platform, SAMPLES.name, task.source)
            known = known.limit(0) if task.afresh else known
            plan = waiting.keep(plan_of(outcomes, known), "plan")
            return act(Work(outcomes, waiting, known, plan, totals_of(came, plan), rules, stamp))

        return undisturbed(planned)


def _survived(rows: Rows, rules: Rules, waiting: Waiting) -> DataFrame:
    """Rows decoded; where a worker dies of one of them, once more in guarded processes that find it."""
    try:
        return _decoded(rows, rules, waiting, decode_batches)
    except Exception as error:
        if not worker_died(error):
            raise
        logger.warning("a Python worker died while it decoded: its rows are decoded again in guarded processes")
        return _decoded(rows, rules, waiting, decode_guarded)


def _decoded(rows: Rows, rules: Rules, waiting: Waiting, decoder: Callable[..., Iterator[RecordBatch]]) -> DataFrame:
    """Rows (`staging.NARROW`), decoded."""
    started = time.monotonic()
    decode = partial(staged, decode=partial(decoder, read=rows.read, rules=rules), folder=str(waiting.folder))
    outcomes = waiting.keep(rows.frame.mapInArrow(decode, from_arrow_schema(NARROW)), "outcomes")
    logger.info("rows decoded in %.1f s", time.monotonic() - started)
    return outcomes

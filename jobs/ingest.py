"""`lakesight ingest`: pictures and texts into the samples table, bad rows into quarantine, a page that shows both."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.progress import waiting
from pipelines.errors import UserError

if TYPE_CHECKING:
    from pipelines.driver.ingest.report import FullReport

logger = logging.getLogger(__name__)


def ingest(
    *,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Read everything again, and replace all that this data brought before.")
    ] = False,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read new and changed files into table samples, bad rows into quarantine.

    \b
    Example:
      lakesight ingest --run seemore --set data.source.path=inputs.csv
    """
    with open_job(run, platform, overrides, as_json) as job:
        report = run_ingest(job, refresh=refresh)
        job.finish(report, "shard")


def run_ingest(job: Job, *, refresh: bool = False) -> FullReport:
    """The stage: read the run's source, say what became of each row, and write the page that shows it.

    Raises:
        TooManyRefused: after everything is written, the page too.
    """
    from pipelines.driver.ingest.report import write_report
    from pipelines.driver.ingest.run import ingest
    from pipelines.driver.ingest.totals import TooManyRefused

    with waiting("ingest"):
        try:
            done = ingest(job.spark, job.platform, job.source, job.config.data, refresh=refresh)
        except TooManyRefused as error:
            report = write_report(job.spark, job.platform, error.report)
            _say(job, report)
            track(job, report, good=False)
            raise
        report = write_report(job.spark, job.platform, done)
    _say(job, report)
    track(job, report, good=True)
    return report


def track(job: Job, report: FullReport, *, good: bool) -> None:
    """Log the report to MLflow where the ingest changed something. The tables are written: an outage is no failure."""
    if report.nothing_new:
        return
    from pipelines.tracking.reports import log_stage

    try:
        tags = {"source": report.source, "ingest_id": report.ingest_id, "table_version": report.dataset_version}
        name = f"{report.source}-{report.ingest_id}"
        log_stage(job.platform, "ingest", name, report.model_dump(), tags=tags, pages=[Path(report.page)], good=good)
    except UserError as error:
        logger.warning("the tables are written, but the report is not in MLflow: %s", error)


def _say(job: Job, report: FullReport) -> None:
    job.screen.line(
        "ingest",
        f"{report.rows_in:,} rows = {report.new:,} new + {report.merged:,} merged + "
        f"{report.duplicates:,} duplicates + {report.quarantined:,} quarantined",
    )
    if report.near_duplicates.pictures:
        near = report.near_duplicates
        job.screen.line("", f"{near.pictures:,} nearly equal others; {near.across_splits:,} of these across splits")
    if report.unchanged:
        job.screen.line("", f"{report.unchanged:,} files or rows of captions unchanged and not read")
    if report.removed:
        job.screen.line("", f"{report.removed:,} pictures removed: their rows in the table were changed or deleted")
    if report.nothing_new:
        job.screen.line("", "nothing new")
    job.screen.line("", report.page)

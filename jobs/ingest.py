"""`lakesight ingest`: pictures and texts into the samples table, bad rows into quarantine, a page that shows both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.progress import waiting

if TYPE_CHECKING:
    from pipelines.driver.report import FullReport


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
    from pipelines.driver.account import TooManyRefused
    from pipelines.driver.ingest import ingest
    from pipelines.driver.report import write_report

    with waiting("ingest"):
        try:
            done = ingest(job.spark, job.platform, job.source, job.config.data, refresh=refresh)
        except TooManyRefused as error:
            _say(job, write_report(job.spark, job.platform, error.report))
            raise
        report = write_report(job.spark, job.platform, done)
    _say(job, report)
    return report


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

"""`lakesight ingest`: pictures and texts into the samples table, bad rows into quarantine, a page that shows both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.progress import waiting

if TYPE_CHECKING:
    from pipelines.driver.report import FullReport


def ingest(
    *,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read pictures into table samples, bad rows into quarantine.

    \b
    Example:
      lakesight ingest --run seemore --set data.source.path=inputs.csv
    """
    with open_job(run, platform, overrides, as_json) as job:
        report = run_ingest(job)
        job.finish(report, "shard")


def run_ingest(job: Job) -> FullReport:
    """The stage: read the run's source, say what became of each row, and write the page that shows it.

    Raises:
        TooManyRefused: after everything is written, the page too.
    """
    from pipelines.driver.ingest import TooManyRefused, ingest
    from pipelines.driver.report import write_report

    with waiting("ingest"):
        try:
            done = ingest(job.spark, job.platform, job.source, job.config.data)
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
    if report.rows_in == report.duplicates:
        job.screen.line("", "nothing new")
    job.screen.line("", report.page)

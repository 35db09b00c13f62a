"""`lakesight ingest`: base64 pictures and texts into the samples table, bad rows into quarantine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.progress import waiting

if TYPE_CHECKING:
    from pipelines.driver.ingest import IngestReport


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


def run_ingest(job: Job) -> IngestReport:
    """The stage: read the run's source, and say what became of each row."""
    from pipelines.driver.ingest import ingest

    with waiting("ingest"):
        report = ingest(job.spark, job.platform, job.source, job.config.data)
    job.screen.line(
        "ingest",
        f"{report.rows_in:,} rows = {report.new:,} new + {report.merged:,} merged + "
        f"{report.duplicates:,} duplicates + {report.quarantined:,} quarantined",
    )
    if report.rows_in == report.duplicates:
        job.screen.line("", "nothing new")
    return report

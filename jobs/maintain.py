"""`lakesight maintain`: tables put in order, with nothing in them changed."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.common import JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.progress import waiting


def maintain(
    *,
    retain_hours: Annotated[
        int, typer.Option("--retain-hours", help="Keep files that versions of the last so many hours need.")
    ] = 168,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put small files of every table together, and remove files that no reader needs.

    No row changes, and shards stay found. It may run beside any other command.

    \b
    Example:
      lakesight maintain --retain-hours 336
    """
    with open_job(run, platform, overrides, as_json) as job:
        from pipelines.driver.delta.maintain import maintain as keep_up

        with waiting("maintain"):
            report = keep_up(job.spark, job.platform, retain_hours)
        for table in report.tables:
            job.screen.line("maintain", f"{table.table}: {table.files:,} files, {table.bytes / 2**20:,.0f} MB")
            if table.postponed:
                job.screen.line("", f"postponed, it is being written to: {table.postponed}")
            else:
                job.screen.line("", f"{table.rewritten:,} files became {table.written:,}; {table.removed:,} removed")
        job.screen.report(report)

"""`lakesight maintain`: compact and vacuum all tables. No row changes."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.common import JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.progress import show_elapsed


def maintain(
    *,
    retain_hours: Annotated[
        int,
        typer.Option("--retain-hours", help="Keep files of table versions of the last N hours.", metavar="N"),
    ] = 168,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compact and vacuum all tables.

    The command merges small files of the Delta tables and removes files that no reader needs. The command changes no
    rows. Existing shards stay valid, and other commands may run at the same time.

    \b
    Example:
      lakesight maintain --retain-hours 336
    """
    with open_job(run, platform, overrides, as_json) as job:
        from pipelines.driver.delta.maintain import maintain as maintain_tables

        with show_elapsed("maintain"):
            report = maintain_tables(job.spark, job.platform, retain_hours)
        for table in report.tables:
            job.output.line("maintain", f"{table.table}: {table.files:,} files, {table.bytes / 2**20:,.0f} MB")
            if table.postponed:
                job.output.line("", f"postponed to the next run: another job writes to the table: {table.postponed}")
            else:
                merged = f"{table.rewritten:,} files merged into {table.written:,}"
                job.output.line("", f"{merged}; {table.removed:,} removed")
        job.output.report(report)

"""`lakesight migrate`: bring the tables and the home folder to the format of this release, or undo a migration."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.common import JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.progress import show_elapsed
from pipelines.errors import UserError


def migrate(
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the SQL statements that the migration would execute.")
    ] = False,
    undo: Annotated[
        bool, typer.Option("--undo", help="Undo the last migration: restore all tables to their earlier versions.")
    ] = False,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring tables and home folder to the format of this release.

    Data of earlier releases can be used without a migration. After a migration, releases that do not know the new
    format refuse the data. Nothing is ingested, trained or captioned again. --undo is possible until a command writes
    rows, or until VACUUM removes files of the earlier table versions.

    \b
    Examples:
      lakesight migrate --dry-run
      lakesight migrate --undo
    """
    if dry_run and undo:
        raise UserError("--dry-run and --undo cannot be combined", fix="use only one of --dry-run and --undo")
    with open_job(run, platform, overrides, as_json) as job:
        from pipelines.driver.delta import migrate as migration

        with show_elapsed("migrate"):
            if undo:
                report = migration.undo(job.spark, job.platform)
            else:
                report = migration.migrate(job.spark, job.platform, dry_run=dry_run)
        for table in report.tables:
            for statement in table.statements:
                job.output.line("would run" if dry_run else "done", statement)
        job.output.line("migrate", f"format {report.before} -> {report.after}" + (" (dry run)" if dry_run else ""))
        job.output.report(report)

"""`lakesight maintain`: compact and vacuum all tables, or remove old folders. No row changes."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job, refuse_options
from jobs.progress import show_elapsed
from pipelines.errors import UserError


def maintain(
    *,
    retain_hours: Annotated[
        int | None,
        typer.Option(
            "--retain-hours",
            help="From now on, keep the files of all table versions of the last N hours. For new tables, N is 168.",
            metavar="N",
        ),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option("--keep", help="List old folders, but not the N newest folders of each kind.", metavar="N"),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the folders that --keep lists.")] = False,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compact and vacuum all tables, or remove old folders.

    The command merges small files of the Delta tables and removes files that no reader needs. The command changes no
    rows. Existing shards stay valid, and other commands may run at the same time.

    With --keep, the command leaves the tables alone and lists old folders of runs, checkpoints, shards and reports.
    With --remove, the command also removes these folders. Folders that a registered version or a newer folder needs are
    kept.

    \b
    Examples:
      lakesight maintain --retain-hours 336
      lakesight maintain --keep 3
      lakesight maintain --keep 3 --remove
    """
    if remove and keep is None:
        raise UserError("--remove needs --keep", fix="add --keep N, which keeps the N newest folders of each kind")
    if keep is not None:
        refuse_options({"--retain-hours": retain_hours}, "--keep leaves the tables alone")
    with open_job(run, platform, overrides, as_json, needs_space=keep is None) as job:
        if keep is not None:
            _clean_up(job, keep, remove=remove)
            return
        from pipelines.driver.delta.maintain import maintain as maintain_tables

        with show_elapsed("maintain"):
            report = maintain_tables(job.spark, job.platform, retain_hours)
        for table in report.tables:
            job.output.line("maintain", f"{table.table}: {table.files:,} files, {table.bytes / 2**20:,.0f} MB")
            if table.postponed:
                job.output.line("", f"not maintained now, because another job writes to the table: {table.postponed}")
            else:
                merged = f"{table.rewritten:,} files merged into {table.written:,}"
                job.output.line("", f"{merged}; {table.removed:,} removed")
        job.output.report(report)


def _clean_up(job: Job, keep: int, *, remove: bool) -> None:
    """List old folders. If `remove` is True, remove those of these folders that no other command has begun to use."""
    from pipelines.driver.old_folders import find_old_folders, remove_folders
    from pipelines.tracking.download import needed_checkpoints

    old = find_old_folders(job.platform, keep, needed_checkpoints(job.platform))
    for folder in old:
        job.output.line(folder.kind, f"{folder.path}, {folder.bytes / 2**20:,.1f} MB")
    if remove:
        removed = remove_folders(job.platform, keep, old, lambda: needed_checkpoints(job.platform))
        for folder in old:
            if folder not in removed:
                job.output.line("kept", f"{folder.path}, because another command uses or has removed it")
        old = removed
    total = sum(folder.bytes for folder in old)
    what = "removed" if remove else "that --remove would remove"
    job.output.line("maintain", f"{len(old):,} folders, {total / 2**20:,.1f} MB {what}")
    job.output.report({"folders": old, "bytes": total, "removed": remove})

"""`lakesight ingest`: add rows to table `samples` or `texts` and bad rows to `quarantine`, and write a report."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.progress import show_elapsed
from pipelines.errors import UserError

if TYPE_CHECKING:
    from pipelines.driver.ingest.report import FullReport

logger = logging.getLogger(__name__)

SHOWN_FILES = 5
"""Maximum number of file names that the command prints in one list. There is a list of unread files for each reason,
and a list of the files that could not be read completely."""


def ingest(
    *,
    refresh: Annotated[
        bool,
        typer.Option(
            "--refresh", help="Read all input again, and replace all rows that earlier ingests of this source wrote."
        ),
    ] = False,
    source_path: Annotated[
        str,
        typer.Option(
            "--source-path", help="File or folder to ingest. Default: data.source.path of the run.", metavar="PATH"
        ),
    ] = "",
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read new and changed pictures into table samples.

    The rows of a source of kind text are added to table texts. Bad rows are added to table quarantine with a reason.
    Unchanged files are skipped. The command also writes an HTML report of both tables.

    \b
    Example:
      lakesight ingest --run seemore --set data.source.path=inputs.csv
    """
    path = [f"data.source.path={source_path}"] if source_path else []
    with open_job(run, platform, [*(overrides or ()), *path], as_json) as job, job.output.report_of_failure():
        report = run_ingest(job, refresh=refresh)
        job.finish(report, "shard")


def run_ingest(job: Job, *, refresh: bool = False) -> FullReport:
    """Run the ingest stage: read the run's source, write the tables and the report page, and print the counts.

    If the source has nothing new, print the counts only.

    Raises:
        UserError: the source does not exist or does not fit the data config.
        TooManyRefused: too many rows were refused. The tables and the report page are written before the exception is
            raised.
    """
    from pipelines.driver.ingest.finished import find_finished
    from pipelines.driver.ingest.report import write_report
    from pipelines.driver.ingest.run import ingest
    from pipelines.driver.ingest.sources.open import check_input
    from pipelines.driver.ingest.texts.report import write_text_report
    from pipelines.driver.ingest.totals import TooManyRefused

    write = write_text_report if job.config.data.source.kind == "text" else write_report
    if not refresh and (finished := find_finished(job.platform, job.source, job.config.data)):
        _print_report(job, finished)
        return finished
    check_input(job.platform, job.config.data)
    with show_elapsed("ingest"):
        try:
            done = ingest(job.spark, job.platform, job.source, job.config.data, refresh=refresh)
        except TooManyRefused as error:
            report = write(job.spark, job.platform, error.report)
            _print_report(job, report)
            log_to_mlflow(job, report, good=False)
            error.report = report
            raise
        report = write(job.spark, job.platform, done)
    _print_report(job, report)
    log_to_mlflow(job, report, good=True)
    return report


def log_to_mlflow(job: Job, report: FullReport, *, good: bool) -> None:
    """Log an ingest report to MLflow if the ingest changed a table. If the tracking server fails, only log a warning.

    The tables are written before this call, so an outage of MLflow does not fail the ingest.
    """
    if report.nothing_new:
        return
    from pipelines.driver.ingest.totals import describe_counts
    from pipelines.tracking.describe.notes import code_block
    from pipelines.tracking.reports import StageLog, log_stage

    counts = f"{report.rows_in:,} rows = {describe_counts(report)}"
    table = "texts" if job.config.data.source.kind == "text" else "samples"
    log = StageLog(
        kind="ingest",
        name=f"{report.source}: {report.new:,} new, {report.quarantined:,} quarantined",
        report=report.model_dump(),
        tags={"source": report.source, "ingest_id": report.ingest_id, "table_version": report.dataset_version},
        pages=[Path(report.page)],
        text=f"Source **{report.source}**, table `{table}` at version {report.dataset_version}: {counts}. The page "
        f"`{Path(report.page).name}` in the artifacts shows {table} and refused rows.\n\n"
        f"{code_block(job.command('ingest'))}",
    )
    try:
        log_stage(job.platform, log, good=good)
    except UserError as error:
        logger.warning("the tables are written, but the report could not be logged to MLflow: %s", error)


def _name_passed_over(report: FullReport) -> str:
    """Return a text that lists, for each reason, the first files that were not read, and the number of the remaining
    files."""
    parts = []
    for reason, count in report.passed_over_count.items():
        names = report.passed_over.get(reason, [])[:SHOWN_FILES]
        more = [f"{count - len(names):,} more"] if count > len(names) else []
        parts.append(f"{', '.join([*names, *more])} ({reason})")
    return "; ".join(parts)


def _print_report(job: Job, report: FullReport) -> None:
    from pipelines.driver.ingest.totals import describe_counts

    job.output.line("ingest", f"{report.rows_in:,} rows = {describe_counts(report)}")
    if known := report.refused - report.quarantined:
        job.output.line(
            "",
            f"{known:,} of the duplicates were refused again; quarantine keeps the reason of their first refusal",
        )
    if report.splits:
        job.output.line("splits", ", ".join(f"{count:,} {split}" for split, count in report.splits.items()))
    if report.near_duplicates.pictures:
        near = report.near_duplicates
        job.output.line("", f"{near.pictures:,} near-duplicates, {near.across_splits:,} of these in another split")
    if report.unchanged:
        job.output.line("", f"{report.unchanged:,} unchanged files or caption rows skipped")
    if report.passed_over:
        job.output.line(
            "", f"{sum(report.passed_over_count.values()):,} files passed over (not read): {_name_passed_over(report)}"
        )
    if report.unreadable_files:
        count = len(report.unreadable_files)
        shown = "; ".join(report.unreadable_files[:SHOWN_FILES])
        job.output.line("", f"{count:,} files or pictures could not be read completely: {shown}")
    if report.removed:
        job.output.line("", f"{report.removed:,} pictures removed because their source rows were changed or deleted")
    if report.nothing_new:
        job.output.line("", "nothing new")
    job.output.line("page", report.page)

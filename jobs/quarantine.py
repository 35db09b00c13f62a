"""`lakesight quarantine`: show the rows that ingest refused, by quarantine reason, or process these rows again."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job, refuse_options
from jobs.progress import show_elapsed
from pipelines.errors import UserError
from pipelines.formats.tables import REASONS

ROWS = 2
"""Default number of rows to show for each source and reason."""
WIDTH = 100
"""Largest number of characters of a payload in the output. A longer payload is cut and ends with three dots."""


class Action(StrEnum):
    """What the command does: show the quarantined rows, or process them again."""

    SHOW = "show"
    REPLAY = "replay"


def quarantine(
    action: Annotated[
        Action,
        typer.Argument(
            help="show: print refused rows of all sources. replay: check the run's refused rows again.",
            metavar="ACTION",
        ),
    ] = Action.SHOW,
    *,
    reason: Annotated[
        list[str] | None,
        typer.Option("--reason", help="Quarantine reason of the rows to select. Repeatable.", metavar="REASON"),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            "--rows", min=0, help="Number of rows to show for each source and reason. Default: 2.", metavar="N"
        ),
    ] = None,
    gallery: Annotated[bool, typer.Option("--gallery", help="Write an HTML page with the rows' pictures.")] = False,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show quarantined rows, or process them again.

    Use replay after you have removed the cause of a refusal, for example after you have raised a limit that was too
    low. A replay checks the quarantined rows of the run's data again. Rows that are now accepted are added to table
    samples. In table quarantine, column replayed_at of these rows is set to the time of the replay.

    \b
    Examples:
      lakesight quarantine --gallery
      lakesight quarantine replay --run birds --reason text_too_long \\
        --set data.limits.max_text_chars=5000
    """
    reasons = _check_reasons(reason or [])
    if action is Action.REPLAY:
        refuse_options({"--rows": rows, "--gallery": gallery}, "quarantine replay shows no rows")
    with open_job(run, platform, overrides, as_json, needs_space=action is Action.REPLAY or gallery) as job:
        if action is Action.REPLAY:
            _replay(job, reasons)
        else:
            _show_rows(job, reasons, ROWS if rows is None else rows, pictures=gallery)


def _check_reasons(reasons: list[str]) -> list[str]:
    unknown = sorted(set(reasons) - set(REASONS))
    if unknown:
        raise UserError(
            f"unknown quarantine reason: {', '.join(unknown)}",
            where="--reason",
            fix=f"choose from {', '.join(REASONS)}",
        )
    return reasons


def _show_rows(job: Job, reasons: list[str], rows: int, *, pictures: bool) -> None:
    from pipelines.driver.ingest.quarantine_report import inspect_quarantine, open_quarantine

    with show_elapsed("quarantine"):
        select = open_quarantine(lambda: job.spark, job.platform)
        report = inspect_quarantine(select, job.platform, reasons, rows, pictures=pictures)
    if not report.counts:
        job.output.line("quarantine", "no rows")
    for count in report.counts:
        replayed = f", {count.replayed:,} of them replayed" if count.replayed else ""
        latest = f"the latest {count.latest:%Y-%m-%d %H:%M}"
        job.output.line(count.source, f"{count.rows:>8,} {count.reason}{replayed}, {latest}")
        for row in report.rows:
            if (row.source, row.reason) == (count.source, count.reason):
                payload = row.payload if len(row.payload) <= WIDTH else row.payload[: WIDTH - 3] + "..."
                job.output.hanging(f"    {row.source_row}  ", row.detail)
                job.output.hanging("      ", payload)
    if report.gallery:
        job.output.line("gallery", report.gallery)
    job.output.report(report)


def _replay(job: Job, reasons: list[str]) -> None:
    from pipelines.driver.ingest.replay import replay

    if not reasons:
        raise UserError(
            "replay needs at least one quarantine reason",
            where="--reason",
            got="no --reason",
            fix=f"add --reason with one of {', '.join(REASONS)}",
        )
    with show_elapsed("replay"):
        report = replay(job.spark, job.platform, job.source, job.config.data, reasons)
    num_refused = sum(report.refused.values())
    by_reason = ", ".join(f"{count:,} {reason}" for reason, count in report.refused.items())
    job.output.line(
        "replay",
        f"{report.rows_in:,} rows = {report.new:,} new + {report.merged:,} merged + "
        f"{report.duplicates:,} duplicates + {num_refused:,} still refused{f' ({by_reason})' if by_reason else ''}",
    )
    job.finish(report, "shard" if report.new or report.merged else "quarantine")

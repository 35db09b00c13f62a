"""`lakesight compare`: two versions on the same rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.evaluate import SHOWN, measured, open_model, open_split

if TYPE_CHECKING:
    from pipelines.driver.evaluate.compare import Comparison


def compare(
    one: Annotated[str, typer.Argument(help="Model version: a number, an alias, or latest.")],
    other: Annotated[str, typer.Argument(help="Another.")],
    *,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two versions on the same rows.

    Differences with the intervals of a paired bootstrap, wins and losses, and a page of pictures with both captions.
    A version that is not evaluated yet is evaluated first.

    \b
    Example:
      lakesight compare challenger champion --run demo
    """
    with open_job(run, platform, overrides, as_json) as job:
        job.finish(run_compare(job, one, other), "promote")


def run_compare(job: Job, one: str, other: str) -> Comparison:
    """The stage: evaluate both where they are not, and compare."""
    from pipelines.driver.evaluate.compare import compare

    models = [open_model(job, which) for which in (one, other)]
    splits = [open_split(job, model) for model in models]
    first, second = (measured(job, model, shards) for model, shards in zip(models, splits, strict=True))
    report = compare(job.spark, job.platform, splits[0].manifest.request, first, second)
    job.screen.line("compare", f"{report.model_name}, version {report.one} minus version {report.other}")
    for name in SHOWN:
        if name in report.differences:
            gain = report.differences[name]
            job.screen.line("", f"{name:<12} {gain.value:+7.3f}  ({gain.low:+.3f} to {gain.high:+.3f})")
    job.screen.line(
        "rows", f"{report.rows:,} = {report.wins:,} won + {report.losses:,} lost + {report.ties:,} equal, by word F1"
    )
    job.screen.line("page", str(report.page))
    return report

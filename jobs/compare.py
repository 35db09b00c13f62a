"""`lakesight compare`: compare two model versions on the same rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.evaluate import SHOWN_METRICS, evaluate_version, open_model, open_split
from jobs.next_commands import after_comparison
from jobs.settings_of_version import with_overrides

if TYPE_CHECKING:
    from pipelines.driver.evaluate.compare import Comparison


def compare(
    one: Annotated[str, typer.Argument(help="Model version: a number, an alias, or latest.", metavar="VERSION")],
    other: Annotated[
        str, typer.Argument(help="Model version that the first version is compared with.", metavar="OTHER")
    ],
    *,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two model versions on the same rows.

    The command prints metric differences with paired bootstrap confidence intervals, and the number of rows on which
    each version is better. The command also writes an HTML page of pictures with the captions of both
    versions. A model version that has no evaluation yet is evaluated before the comparison.

    \b
    Example:
      lakesight compare 2 1 --run demo
    """
    with open_job(run, platform, overrides, as_json, uses_version=True) as job:
        report = run_compare(job, one, other)
        job.output.report(report)
        job.output.next(*after_comparison(job, report))


def run_compare(job: Job, one: str, other: str) -> Comparison:
    """Evaluate both versions if necessary, compare them and print the comparison."""
    from pipelines.driver.evaluate.compare import compare, describe_outcome

    models = [with_overrides(job, open_model(job, which)) for which in (one, other)]
    splits = [open_split(job, model) for model in models]
    first, second = (evaluate_version(job, model, shards) for model, shards in zip(models, splits, strict=True))
    report = compare(job.spark, job.platform, splits[0].manifest.request, first, second, metric=job.config.gate.metric)
    job.output.line("compare", f"{report.model_name}, version {report.one}, version {report.other}, and the difference")
    for name in SHOWN_METRICS:
        if name in report.differences:
            difference = report.differences[name]
            interval = f"({difference.low:+z.3f} to {difference.high:+z.3f})"
            values = f"{report.one_metrics[name].value:z7.3f} {report.other_metrics[name].value:z7.3f}"
            job.output.line("", f"{name:<12} {values} {difference.value:+z7.3f}  {interval}")
    job.output.line("", f"texts are split into words by {report.tokenisation}")
    job.output.line(
        "rows",
        f"{report.rows:,} = {report.wins:,} better + {report.losses:,} worse + {report.ties:,} equal (word F1 of "
        f"version {report.one})",
    )
    job.output.line("verdict", describe_outcome(report))
    job.output.line("page", str(report.page))
    return report

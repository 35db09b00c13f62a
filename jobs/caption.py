"""`lakesight caption`: captions for the rows of a Delta table that a model version has not captioned yet."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common import Job, JsonOption, PlatformOption, PrecisionOption, RunOption, SetOption, open_job
from jobs.evaluate import VersionOption, open_model
from jobs.progress import progress
from pipelines.errors import StageFailed, UserError
from vlm.config import Precision

if TYPE_CHECKING:
    from pipelines.driver.caption.drift import Drift
    from pipelines.driver.caption.run import CaptionReport

logger = logging.getLogger(__name__)


def caption(
    *,
    table: Annotated[str, typer.Option("--table", help="Delta table with the pictures.")] = "samples",
    id_column: Annotated[str, typer.Option("--id-column", help="Its column of unique ids.")] = "image_id",
    image_column: Annotated[str, typer.Option("--image-column", help="Its pictures, binary or base64 text.")] = "image",
    where: Annotated[str, typer.Option("--where", help="SQL condition on its rows; empty for all.")] = "",
    prompt: Annotated[str, typer.Option("--prompt", help="A question; empty asks for a caption.")] = "",
    version: VersionOption = "champion",
    precision: PrecisionOption = Precision.FP32,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Try rows again that have an error.")] = False,
    remove_deleted: Annotated[
        bool, typer.Option("--remove-deleted", help="Remove captions of rows that the table no longer has.")
    ] = False,
    max_error_share: Annotated[
        float, typer.Option("--max-error-share", min=0, max=1, help="More errors fail the job, after all is written.")
    ] = 1.0,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Caption what a version has not captioned yet, and pictures that have changed.

    A job that was killed goes on where it ended. Figures of what was captioned stand beside those of the version's
    evaluation; beyond the limits of the run's drift section they are a warning.

    \b
    Examples:
      lakesight caption --run demo
      lakesight caption --run demo --table shop.products --id-column sku --image-column photo --max-error-share 0.1
    """
    with open_job(run, platform, overrides, as_json) as job:
        report = run_caption(
            job,
            version,
            source_table=table,
            id_column=id_column,
            image_column=image_column,
            where=where,
            prompt=prompt,
            precision=precision,
            retry_errors=retry_errors,
            remove_deleted=remove_deleted,
            max_error_share=max_error_share,
        )
        job.screen.report(report)
        job.screen.line("next", "lakesight show generated_captions --gallery")


def run_caption(job: Job, which: str, **request: object) -> CaptionReport:
    """The stage, under the run's limits on pictures and on drift; `request` as in CaptionRequest.

    Raises:
        TooManyErrors: after everything is written.
        StageFailed: likewise, where figures drift and the run's `drift.fail` asks for it.
    """
    from pipelines.driver.caption.run import CaptionRequest, TooManyErrors, caption

    model = open_model(job, which)
    wanted = CaptionRequest.model_validate(request | {"limits": job.config.data.limits})
    try:
        done = caption(
            job.spark,
            job.platform,
            model,
            wanted,
            lambda count, total: progress("caption", lambda: (count(), ""), total),
        )
    except TooManyErrors as error:
        report = with_drift(job, error.report, wanted.prompt)
        _say(job, report)
        track(job, report, good=False)
        raise
    report = with_drift(job, done, wanted.prompt)
    _say(job, report)
    beyond = {name: drift for name, drift in report.drift.items() if drift.beyond}
    track(job, report, good=not (beyond and job.config.drift.fail))
    if beyond:
        _alert(job, report, beyond)
    return report


def with_drift(job: Job, report: CaptionReport, prompt: str) -> CaptionReport:
    """A report with its figures beside those of the version's evaluation."""
    from pipelines.driver.caption.drift import compare_figures, evaluated

    rows = report.captioned + report.errors
    if rows < job.config.drift.min_rows:
        return report
    measure = evaluated(
        job.spark,
        job.platform,
        model=report.model_name,
        version=report.model_version,
        source=job.source,
        split=job.config.data.evaluate_on,
    )
    drift = compare_figures(report.figures, rows, measure, job.config.drift, prompt=prompt)
    return report.model_copy(update={"drift": drift})


def track(job: Job, report: CaptionReport, *, good: bool) -> None:
    """Log the report to MLflow where something was captioned. The table is written: an outage is no failure."""
    from pipelines.tracking.reports import log_stage

    if report.considered == report.already:
        return
    names = ("model_name", "model_version", "settings_hash", "source_table", "source_version")
    tags = {name: getattr(report, name) for name in names}
    tags["drifted"] = ", ".join(name for name, drift in report.drift.items() if drift.beyond)
    name = f"{report.model_name}-{report.model_version}-{report.source_table}"
    try:
        log_stage(job.platform, "caption", name, report.model_dump(), tags=tags, good=good)
    except UserError as error:
        logger.warning("the captions are written, but the report is not in MLflow: %s", error)


def _alert(job: Job, report: CaptionReport, beyond: dict[str, Drift]) -> None:
    """Warn of drift, or fail, as the run asks."""
    found = "; ".join(f"{name} {_figures(drift)}" for name, drift in beyond.items())
    if job.config.drift.fail:
        raise StageFailed(
            "what was captioned is not like what was evaluated",
            where=f"{report.source_table} by model {report.model_name} version {report.model_version}",
            got=found,
            fix="everything is written: look at the pictures (`lakesight show generated_captions --gallery`); train on "
            "such pictures, or widen the run's drift section",
        )
    logger.warning("drift: what was captioned is not like what was evaluated: %s", found)


def _figures(drift: Drift) -> str:
    return f"{drift.value:.3g}, evaluated {drift.evaluated:.3g} (change {drift.change:+.3g}, limit {drift.limit:.3g})"


def _say(job: Job, report: CaptionReport) -> None:
    job.screen.line(
        "caption",
        f"{report.considered:,} rows of {report.source_table} = {report.captioned:,} captioned + "
        f"{report.errors:,} errors + {report.already:,} already there",
    )
    for number, what in (
        (report.recovered, "captions of a job that had not ended, from its files"),
        (report.changed, "pictures had changed"),
        (report.removed, "captions removed, whose rows are gone"),
    ):
        if number:
            job.screen.line("", f"{number:,} {what}")
    if report.considered == report.already:
        job.screen.line("", "nothing new")
    for name, drift in report.drift.items():
        job.screen.line("drift" if drift.beyond else "", f"{name:<15}{_figures(drift)}")

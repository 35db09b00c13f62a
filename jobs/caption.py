"""`lakesight caption`: caption the rows of a Delta table whose pictures a model version has not captioned yet."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common import (
    ImageRootOption,
    Job,
    JsonOption,
    PlatformOption,
    PrecisionOption,
    PromptOption,
    RunOption,
    SetOption,
    WhereOption,
    open_job,
)
from jobs.evaluate import VersionOption, open_model
from jobs.generation_options import with_generation_options
from jobs.next_commands import show_captions
from jobs.output import first_line, number
from jobs.progress import show_progress
from jobs.settings_of_version import decoding_settings
from jobs.text_model import require_captioner
from pipelines.errors import FailedWithReport
from vlm.config import Precision

if TYPE_CHECKING:
    from pipelines.driver.caption.drift import Drift
    from pipelines.driver.caption.run import CaptionReport, CaptionRequest
    from pipelines.driver.model_files import ModelFiles

logger = logging.getLogger(__name__)


TableOption = Annotated[
    str,
    typer.Option(
        "--table",
        help="Delta table with the pictures: the name of the table, or the path of its folder.",
        metavar="TABLE",
    ),
]


@with_generation_options
def caption(
    *,
    table: TableOption = "samples",
    id_column: Annotated[
        str, typer.Option("--id-column", help="Column with a unique id for each row.", metavar="COLUMN")
    ] = "image_id",
    image_column: Annotated[
        str, typer.Option("--image-column", help="Column of pictures (binary, base64 or paths).", metavar="COLUMN")
    ] = "image",
    image_root: ImageRootOption = None,
    where: WhereOption = "",
    prompt: PromptOption = "",
    version: VersionOption = "champion",
    precision: PrecisionOption = Precision.FP32,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Caption rows with an error again.")] = False,
    remove_deleted: Annotated[
        bool, typer.Option("--remove-deleted", help="Remove the captions of rows that were deleted from the table.")
    ] = False,
    max_error_share: Annotated[
        float,
        typer.Option("--max-error-share", min=0, max=1, help="Largest share of rows that may fail.", metavar="SHARE"),
    ] = 1.0,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Caption new and changed pictures of a table.

    Pictures that the model version has already captioned are skipped, so a killed job can be run again. The command
    compares statistics of the captions and pictures with the version's evaluation. If a difference (drift) exceeds a
    limit in the run's drift section, the command logs a warning, or fails if drift.fail is set.

    \b
    Examples:
      lakesight caption --run demo --max-error-share 0.1
      lakesight caption --table shop/products --id-column sku --image-column photo
      lakesight caption --table main.shop.products --id-column sku \\
        --image-column path --image-root /Volumes/main/shop/photos
    """
    from pipelines.executor.ingest.records.pictures.root import absolute_location

    with open_job(run, platform, overrides, as_json, uses_version=True) as job, job.output.report_of_failure():
        report = run_caption(
            job,
            version,
            source_table=job.platform.resolve_table(table),
            id_column=id_column,
            image_column=image_column,
            image_root=None if image_root is None else absolute_location(image_root),
            where=where,
            prompt=prompt,
            precision=precision,
            retry_errors=retry_errors,
            remove_deleted=remove_deleted,
            max_error_share=max_error_share,
        )
        job.output.report(report)
        job.output.next(*show_captions(job))


def run_caption(job: Job, which: str, **request: object) -> CaptionReport:
    """Run the caption stage, and return a report that includes the drift.

    Args:
        job: the running command; the job's run config contains the limits for pictures and for drift.
        which: model version that writes the captions: a number, an alias such as `champion`, or `latest`.
        request: values for all fields of CaptionRequest except `limits` and `settings`.

    Raises:
        UserError: the model is a text-only model.
        TooManyErrors: more rows failed than allowed. Captions and errors are written before the exception is raised.
        TooMuchDrift: the drift exceeds its limits and the run sets `drift.fail`. The captions are written before the
            exception is raised.
        DriftNotCompared: the drift could not be computed. The captions are written before the exception is raised.
    """
    from jobs.decisions import record_other_promotion
    from jobs.log_captions import log_captions, only_warn
    from pipelines.driver.caption.finished import find_finished
    from pipelines.driver.caption.run import CaptionRequest, TooManyErrors, caption

    require_captioner(job.config.model, "captioning")
    started = datetime.now(UTC)
    model = open_model(job, which)
    settings = decoding_settings(job, model.read_config(), f"{model.name}/{model.version}")
    caption_request = CaptionRequest.model_validate(request | {"limits": job.config.data.limits, "settings": settings})
    failure: FailedWithReport | None = None
    try:
        done = find_finished(job.platform, model, caption_request) or caption(
            job.spark,
            job.platform,
            model,
            caption_request,
            lambda count, total: show_progress("caption", lambda: (count(), ""), total),
        )
    except TooManyErrors as error:
        done, failure = error.report, error
    try:
        report = check_drift(job, done, model, caption_request)
    except Exception as error:  # noqa: BLE001 an error of any kind would hide the report and `failure`
        reason = _describe_unchecked(done, f"the comparison failed: {first_line(error)}")
        report = done.model_copy(update={"drift_unchecked": reason})
        failure = failure or DriftNotCompared(report, error)
    _print_report(job, report)
    drifted = {name: drift for name, drift in report.drift.items() if drift.beyond}
    if drifted and not job.config.drift.fail:
        logger.warning(
            "captions or pictures differ too much from the version's evaluation (drift): %s", _format_drifts(drifted)
        )
    elif drifted and failure is None:
        failure = TooMuchDrift(report, drifted, show_captions(job))
    log_captions(job, report, caption_request, started, good=failure is None)
    if which == "champion":
        with only_warn("the champion could not be compared with table decisions"):
            record_other_promotion(job, model)
    if failure is not None:
        failure.report = report
        raise failure
    return report


class TooMuchDrift(FailedWithReport):
    """Drift exceeds its limits, and the run sets `drift.fail`. All captions are written before the error is raised."""

    def __init__(self, report: CaptionReport, drifted: Mapping[str, Drift], commands: Sequence[str]) -> None:
        """Describe the drift. `commands` has the command that shows the captions, or is empty in a workspace."""
        self.report = report
        look = f"view them with `{commands[0]}`" if commands else "read the newest rows of table generated_captions"
        super().__init__(
            "captions or pictures differ too much from the version's evaluation (drift)",
            where=f"{report.source_table} by model {report.model_name} version {report.model_version}",
            got=_format_drifts(drifted)
            + ("; captioned by an earlier job that failed" if report.drift_of_failed else ""),
            fix=f"the captions are written: {look}, then train on such pictures or raise the limits of the run's drift "
            "section; or accept the drift: run the command once with --set drift.fail=false",
        )


class DriftNotCompared(FailedWithReport):
    """The drift of a job could not be computed. All captions are written before the error is raised."""

    def __init__(self, report: CaptionReport, error: Exception) -> None:
        """Describe the error with which the comparison has ended."""
        self.report, self.__cause__ = report, error
        super().__init__(
            "captions and pictures could not be compared with the version's evaluation (drift)",
            where=f"{report.source_table} by model {report.model_name} version {report.model_version}",
            got=first_line(error),
            fix="the captions are written: correct the cause and run the command again, which then compares these rows",
        )


def check_drift(job: Job, report: CaptionReport, model: ModelFiles, request: CaptionRequest) -> CaptionReport:
    """Compare a job with the version's evaluation, and add the drift to the report. If nothing can be compared, add the
    reason instead.

    If `drift.fail` is set, the figures of a job with drift are stored until a later job has captioned enough rows for a
    comparison. Until then, each job with too few rows fails because of the stored figures. The figures of a job are
    also stored if the comparison fails or is killed, because a repeated job finds no row to caption.
    """
    from pipelines.driver.caption.drift import compare_figures, read_evaluation_figures
    from pipelines.driver.caption.failed_jobs import ComparedRows
    from pipelines.driver.caption.run import failed_jobs
    from pipelines.driver.delta.model_rows import is_of_model

    limits = job.config.drift
    failed = failed_jobs(job.platform, model, request, report.source_table)
    compared = ComparedRows(rows=report.captioned + report.errors, figures=report.figures)
    few = compared.rows < limits.min_rows
    if few and (drifted := failed.drifted_rows()):
        compared = drifted
    elif few:
        reason = f"{compared.rows:,} rows, and drift.min_rows is {limits.min_rows:,}" if compared.rows else ""
        return report.model_copy(update={"drift_unchecked": _describe_unchecked(report, reason)})
    failed.keep_drift(compared)
    evaluation = read_evaluation_figures(
        job.spark,
        job.platform,
        model=report.model_name,
        version=report.model_version,
        of_model=is_of_model(report.model_digest, report.run_id),
        source=job.source,
        split=job.config.data.evaluate_on,
        where=job.config.data.shards.where,
    )
    drift = compare_figures(compared.figures, compared.rows, evaluation, limits, prompt=request.prompt)
    if not (limits.fail and any(figure.beyond for figure in drift.values())):
        failed.forget_drift()
    return report.model_copy(
        update={
            "drift": drift,
            "drift_of_failed": few and bool(drift),
            "drift_unchecked": _describe_unchecked(
                report, "" if drift else _describe_few(job, report, evaluation.rows)
            ),
        }
    )


def _describe_unchecked(report: CaptionReport, reason: str) -> str:
    """Return a text that says why drift was not checked, and how many captions of an interrupted job were not compared.

    The statistics of an interrupted job are lost, because only its processes had them in memory.
    """
    recovered = f"{report.recovered:,} captions of an interrupted job were not compared" if report.recovered else ""
    return "; ".join(filter(None, (reason, recovered)))


def _describe_few(job: Job, report: CaptionReport, evaluated: int) -> str:
    """Return the reason why a job with enough rows was not compared with the evaluation of its model version."""
    if evaluated:
        return f"the evaluation has {evaluated:,} rows, and drift.min_rows is {job.config.drift.min_rows:,}"
    return (
        f"table evaluations has no evaluation of version {report.model_version} on split {job.config.data.evaluate_on} "
        f"of source {job.source}"
    )


def _format_drifts(drifts: Mapping[str, Drift]) -> str:
    return "; ".join(f"{name} {_format_drift(drift)}" for name, drift in drifts.items())


def _format_drift(drift: Drift) -> str:
    change = f"change {number(drift.change, signed=True)}, limit {number(drift.limit)}"
    return f"{number(drift.value)}, evaluated {number(drift.evaluated)} ({change})"


def _print_report(job: Job, report: CaptionReport) -> None:
    job.output.line(
        "caption",
        f"{report.considered:,} rows of {report.source_table} = {report.captioned:,} captioned + "
        f"{report.errors:,} errors + {report.already:,} captioned before",
    )
    for count, description in (
        (report.recovered, "captions recovered from the files of an interrupted job"),
        (report.changed, "changed pictures captioned again"),
        (report.removed, "captions removed because their rows were deleted"),
    ):
        if count:
            job.output.line("", f"{count:,} {description}")
    if report.failed_rows:
        failed = f"{report.failed_errors:,} errors in {report.failed_rows:,} rows of jobs that failed or were killed"
        job.output.line("", f"{failed} count in --max-error-share")
    if report.considered == report.already and not report.recovered:
        job.output.line("", "nothing new")
    if report.drift_unchecked:
        job.output.line("drift", f"not checked: {report.drift_unchecked}")
    if report.drift_of_failed:
        job.output.line("drift", "measured on the rows of an earlier job that failed:")
    for name, drift in report.drift.items():
        job.output.line("drift" if drift.beyond else "", f"{name:<15}{_format_drift(drift)}")

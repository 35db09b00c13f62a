"""`lakesight caption`: caption those rows of a Delta table that a model version has not captioned yet."""

from __future__ import annotations

import logging
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
from jobs.output import number
from jobs.progress import show_progress
from jobs.settings_of_version import decoding_settings
from jobs.text_model import require_captioner
from pipelines.errors import StageFailed
from vlm.config import Precision

if TYPE_CHECKING:
    from pipelines.driver.caption.drift import Drift
    from pipelines.driver.caption.run import CaptionReport

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
        str, typer.Option("--image-column", help="Column with the pictures (binary or base64).", metavar="COLUMN")
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
    compares statistics of the captions with the version's evaluation, and logs a warning if a difference (drift)
    exceeds the limits in the run's drift section.

    \b
    Examples:
      lakesight caption --run demo --max-error-share 0.1
      lakesight caption --table shop/products --id-column sku --image-column photo
      lakesight caption --table main.shop.products --id-column sku \\
        --image-column path --image-root /Volumes/main/shop/photos
    """
    from pipelines.executor.ingest.records.pictures.root import absolute_location

    with open_job(run, platform, overrides, as_json) as job:
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
        StageFailed: the drift exceeds its limits and the run sets `drift.fail`. The captions are written before the
            exception is raised.
    """
    from jobs.log_captions import log_captions
    from pipelines.driver.caption.finished import find_finished
    from pipelines.driver.caption.run import CaptionRequest, TooManyErrors, caption

    require_captioner(job.config.model, "captioning")
    started = datetime.now(UTC)
    model = open_model(job, which)
    settings = decoding_settings(job, model.read_config(), f"{model.name}/{model.version}")
    caption_request = CaptionRequest.model_validate(request | {"limits": job.config.data.limits, "settings": settings})
    try:
        done = find_finished(job.platform, model, caption_request) or caption(
            job.spark,
            job.platform,
            model,
            caption_request,
            lambda count, total: show_progress("caption", lambda: (count(), ""), total),
        )
    except TooManyErrors as error:
        report = add_drift(job, error.report, caption_request.prompt)
        _print_report(job, report)
        log_captions(job, report, caption_request, started, good=False)
        raise
    report = add_drift(job, done, caption_request.prompt)
    _print_report(job, report)
    drifted = {name: drift for name, drift in report.drift.items() if drift.beyond}
    log_captions(job, report, caption_request, started, good=not (drifted and job.config.drift.fail))
    if drifted:
        _report_drift(job, report, drifted)
    return report


def add_drift(job: Job, report: CaptionReport, prompt: str) -> CaptionReport:
    """If enough rows were captioned, add the drift (difference from the version's evaluation) to a report."""
    from pipelines.driver.caption.drift import compare_figures, read_evaluation_figures
    from pipelines.driver.delta.model_rows import is_of_model

    rows = report.captioned + report.errors
    if rows < job.config.drift.min_rows:
        return report
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
    drift = compare_figures(report.figures, rows, evaluation, job.config.drift, prompt=prompt)
    return report.model_copy(update={"drift": drift})


def _report_drift(job: Job, report: CaptionReport, drifted: dict[str, Drift]) -> None:
    """Log a warning about drift, or raise StageFailed if the run sets `drift.fail`."""
    found = "; ".join(f"{name} {_format_drift(drift)}" for name, drift in drifted.items())
    if job.config.drift.fail:
        raise StageFailed(
            "captions or pictures differ too much from the version's evaluation (drift)",
            where=f"{report.source_table} by model {report.model_name} version {report.model_version}",
            got=found,
            fix="the captions are written: view them with `lakesight show generated_captions --gallery`, then train on "
            "such pictures or raise the limits of the run's drift section",
        )
    logger.warning("captions or pictures differ too much from the version's evaluation (drift): %s", found)


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
    if report.considered == report.already:
        job.output.line("", "nothing new")
    for name, drift in report.drift.items():
        job.output.line("drift" if drift.beyond else "", f"{name:<15}{_format_drift(drift)}")

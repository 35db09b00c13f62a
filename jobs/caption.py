"""`lakesight caption`: captions for the rows of a Delta table that a model version has not captioned yet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common import Job, JsonOption, PlatformOption, PrecisionOption, RunOption, SetOption, open_job
from jobs.evaluate import VersionOption, open_model
from jobs.progress import progress
from vlm.config import Precision

if TYPE_CHECKING:
    from pipelines.driver.caption import CaptionReport


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

    A job that was killed goes on where it ended.

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
    """The stage, under the run's limits on pictures; `request` as in CaptionRequest."""
    from pipelines.driver.caption import CaptionRequest, caption

    model = open_model(job, which)
    wanted = CaptionRequest.model_validate(request | {"limits": job.config.data.limits})
    report = caption(
        job.spark, job.platform, model, wanted, lambda count, total: progress("caption", lambda: (count(), ""), total)
    )
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
    return report

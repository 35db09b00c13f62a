"""`lakesight caption`: captions for the rows of a Delta table that a model version has not captioned yet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common import Job, JsonOption, PlatformOption, PrecisionOption, RunOption, SetOption, open_job
from jobs.evaluate import VersionOption, open_model
from jobs.progress import waiting
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
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Caption what a version has not captioned yet.

    \b
    Examples:
      lakesight caption --run demo
      lakesight caption --run demo --table shop.products --id-column sku --image-column photo
    """
    with open_job(run, platform, overrides, as_json) as job:
        report = run_caption(
            job,
            version,
            table=table,
            id_column=id_column,
            image_column=image_column,
            where=where,
            prompt=prompt,
            precision=precision,
        )
        job.screen.report(report)
        job.screen.line("next", "lakesight show generated_captions --gallery")


def run_caption(
    job: Job,
    which: str,
    *,
    table: str = "samples",
    id_column: str = "image_id",
    image_column: str = "image",
    where: str = "",
    prompt: str = "",
    precision: Precision = Precision.FP32,
) -> CaptionReport:
    """The stage, under the run's limits on pictures."""
    from pipelines.driver.caption import CaptionRequest, caption

    model = open_model(job, which)
    request = CaptionRequest(
        source_table=table,
        id_column=id_column,
        image_column=image_column,
        where=where,
        prompt=prompt,
        precision=precision,
        limits=job.config.data.limits,
    )
    with waiting("caption"):
        report = caption(job.spark, job.platform, model, request)
    job.screen.line(
        "caption",
        f"{report.considered:,} rows of {report.source_table} = {report.captioned:,} captioned + "
        f"{report.errors:,} errors + {report.already:,} already there",
    )
    if report.considered == report.already:
        job.screen.line("", "nothing new")
    return report

"""`lakesight demo`: run every stage on generated pictures. The command needs no input data."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.common import Job, JsonOption, PlatformOption, SetOption, open_job
from jobs.next_commands import show_quarantine, show_runs
from jobs.pipeline import held_out, run_pipeline
from jobs.pipeline_report import PipelineReport
from pipelines.scenes import broken_rows

RUN = "demo"
SHOWN_CAPTIONS = 5
"""Number of captions that the command prints at the end."""


def demo(
    *,
    scenes: Annotated[
        int, typer.Option("--scenes", min=200, help="Number of pictures to generate.", metavar="N")
    ] = 10_000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Random seed of the pictures.", metavar="N")] = 0,
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run every stage on generated pictures.

    The pictures show simple scenes, each described by one sentence. Some rows are broken on purpose, and ingest writes
    these rows to table quarantine. A second demo skips all work that the first demo finished.

    \b
    Examples:
      lakesight demo
      lakesight demo --set train.steps=300 --json
    """
    with open_job(RUN, platform, overrides, as_json) as job:
        job.override(f"data.source.path=scenes:{scenes}:{seed}")
        job.output.line("scenes", f"{scenes:,} rows, {broken_rows(scenes):,} of these rows broken on purpose")
        report = run_pipeline(job)
        _show_captions(job, report)
        job.output.text("")
        job.output.line(
            "unseen",
            f"{report.exact_match:.0%} of the unseen scenes have an exact caption; total {report.seconds:.0f} s",
        )
        job.output.line("gallery", report.gallery)
        job.output.next(show_quarantine(job), *show_runs(job))
        job.output.report(report)


def _show_captions(job: Job, report: PipelineReport) -> None:
    """Print the human text and the generated caption of a few held-out pictures."""
    from pyspark.sql import functions as F

    generated = job.spark.table(job.platform.table("generated_captions")).where(
        (F.col("model_name") == report.model_name) & (F.col("model_version") == report.model_version)
    )
    samples = job.spark.table(job.platform.table("samples")).where(held_out(job)).select("image_id", "texts")
    both = generated.join(samples, "image_id").select("texts", "caption").orderBy("image_id")
    for row in both.limit(SHOWN_CAPTIONS).collect():
        job.output.text("")
        job.output.hanging("  human      ", row["texts"][0]["text"])
        job.output.hanging("  generated  ", str(row["caption"]))

"""`lakesight pipeline`: run every stage in order."""

from __future__ import annotations

from jobs.caption import run_caption
from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.evaluate import run_evaluate
from jobs.ingest import run_ingest
from jobs.promote import run_promote
from jobs.text_model import run_text_pipeline
from jobs.train import run_train
from vlm.config import Config


class PipelineReport(Config):
    """Report of `lakesight pipeline` and `lakesight demo`.

    Attributes:
        rows_in: number of rows that ingest read; equals `samples` + `duplicates` + `quarantined`.
        samples: number of rows that added a picture or a text to table `samples`.
        duplicates: number of rows whose picture and text were already in table `samples`.
        quarantined: number of rows added to table `quarantine`.
        trained: whether training ran; false if a finished run was reused.
        exact_match: share of the evaluated pictures whose caption equals a human text.
        blind_gap: increase of the loss when each text gets a wrong picture, in nats per token; null for a single
            picture.
        captions: number of pictures captioned by this command.
        captioned_before: number of pictures that this model version had captioned before.
        errors: number of pictures that could not be captioned.
        nothing_new: whether earlier commands had already done all of the work.
        seconds: duration of the whole command, in seconds.
    """

    run: str
    rows_in: int
    samples: int
    duplicates: int
    quarantined: int
    run_id: str
    run_folder: str
    trained: bool
    model_name: str
    model_version: str
    exact_match: float
    blind_gap: float | None
    metrics: dict[str, float]
    captions: int
    captioned_before: int
    errors: int
    gallery: str
    nothing_new: bool
    seconds: float


def pipeline(
    *,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run every stage, from pictures to captions.

    The stages are ingest, shard, train, evaluate, promote and caption. The last stage captions the evaluation split.
    A model of text has no captions, so its stages are ingest, shard, train and evaluate. Finished work is not repeated,
    so run the same command again after an interruption.

    \b
    Example:
      lakesight pipeline --run seemore --set data.source.path=inputs.csv
    """
    with open_job(run, platform, overrides, as_json) as job:
        if job.config.model.text_only:
            job.output.report(run_text_pipeline(job))
            job.output.line("next", f"{job.command('ask')} --version latest --prompt TEXT")
            return
        job.output.report(run_pipeline(job))
        job.output.next("lakesight show generated_captions --gallery", "lakesight ui")


def run_pipeline(job: Job) -> PipelineReport:
    """Run all stages in order. Each stage prints its own results."""
    from pipelines.driver.train.run import check_config

    check_config(job.config)
    ingested = run_ingest(job)
    trained = run_train(job)
    evaluated = run_evaluate(job, trained.model_version)
    run_promote(job, trained.model_version)
    captioned = run_caption(job, trained.model_version, where=held_out(job))
    metrics = evaluated.values()
    nothing_new = ingested.nothing_new and not (trained.trained or captioned.captioned or captioned.errors)
    if nothing_new:
        job.output.line("done", "nothing new: this command ingested no row, trained no step and captioned no picture")
    return PipelineReport(
        run=job.config.name,
        rows_in=ingested.rows_in,
        samples=ingested.new + ingested.merged,
        duplicates=ingested.duplicates,
        quarantined=ingested.quarantined,
        run_id=trained.run_id,
        run_folder=trained.run_folder,
        trained=trained.trained,
        model_name=trained.model_name,
        model_version=trained.model_version,
        exact_match=metrics["exact_match"],
        blind_gap=metrics.get("blind_gap"),
        metrics=metrics,
        captions=captioned.captioned,
        captioned_before=captioned.already,
        errors=captioned.errors,
        gallery=str(evaluated.gallery),
        nothing_new=nothing_new,
        seconds=round(job.output.seconds, 1),
    )


def held_out(job: Job) -> str:
    """Return the SQL condition that selects the run's evaluation split in table `samples`."""
    return f"source = '{job.source}' AND split = '{job.config.data.evaluate_on}'"

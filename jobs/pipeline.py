"""`lakesight pipeline`: run every stage in order."""

from __future__ import annotations

from jobs.caption import run_caption
from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.evaluate import open_object_words, run_evaluate
from jobs.ingest import run_ingest
from jobs.next_commands import ask_text_model, show_captions, show_runs
from jobs.pipeline_report import PipelineReport, describe_stages
from jobs.promote import run_promote
from jobs.text_model import run_text_pipeline
from jobs.train import run_train


def pipeline(
    *,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run every stage, from pictures to captions.

    The stages are ingest, shard, train, evaluate, promote and caption. The last stage captions the evaluation split.
    A text-only model has no captions, so its stages are ingest, shard, train and evaluate. Finished work is not
    repeated, so run the same command again after an interruption.

    \b
    Example:
      lakesight pipeline --run seemore --set data.source.path=inputs.csv
    """
    with open_job(run, platform, overrides, as_json) as job:
        if job.config.model.text_only:
            texts = run_text_pipeline(job)
            job.output.report(texts)
            job.output.next(ask_text_model(job, texts.model_version))
            return
        job.output.report(run_pipeline(job))
        job.output.next(*show_captions(job), *show_runs(job))


def run_pipeline(job: Job) -> PipelineReport:
    """Run all stages in order. Each stage prints its own results."""
    from pipelines.driver.train.run import check_config

    check_config(job.config)
    open_object_words(job.config)  # refuse an invalid word list before the training
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
        **describe_stages(job, ingested, trained),
        samples=ingested.new + ingested.merged,
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

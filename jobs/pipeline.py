"""`lakesight pipeline`: every stage of a run, in order."""

from __future__ import annotations

from jobs.caption import run_caption
from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.evaluate import run_evaluate
from jobs.ingest import run_ingest
from jobs.promote import run_promote
from jobs.train import run_train
from vlm.config import Config


class PipelineReport(Config):
    """What a pipeline did.

    Attributes:
        rows_in: rows read = samples + duplicates + quarantined.
        samples: rows that brought something new to the samples table.
        duplicates: rows that brought nothing new.
        quarantined: rows newly in quarantine.
        trained: whether ranks ran; False where a finished run was found.
        exact_match: share of the evaluated pictures captioned word for word.
        blind_gap: nats per token; None where the split has a single picture.
        captions: pictures captioned now.
        captioned_before: pictures that this version had captioned already.
        errors: pictures that could not be captioned.
        nothing_new: whether everything had been done already.
        seconds: of the whole command.
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

    Ingest, shard, train, register, evaluate, promote, and caption the split that was evaluated.

    What is done already is found and not done again, so the same command goes on after whatever stopped it.

    \b
    Example:
      lakesight pipeline --run seemore --set data.source.path=inputs.csv
    """
    with open_job(run, platform, overrides, as_json) as job:
        job.screen.report(run_pipeline(job))
        job.screen.line("next", "lakesight show generated_captions --gallery, or lakesight ui")


def run_pipeline(job: Job) -> PipelineReport:
    """All stages, each with its line."""
    ingested = run_ingest(job)
    trained = run_train(job)
    evaluated = run_evaluate(job, trained.model_version)
    run_promote(job, trained.model_version)
    captioned = run_caption(job, trained.model_version, where=held_out(job))
    metrics = evaluated.values()
    worked = trained.trained or captioned.captioned or captioned.errors
    nothing_new = ingested.nothing_new and not worked
    if nothing_new:
        job.screen.line("done", "nothing was new: no row ingested, no step trained, no picture captioned")
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
        seconds=round(job.screen.seconds, 1),
    )


def held_out(job: Job) -> str:
    """SQL condition for the pictures that the run is evaluated on."""
    return f"source = '{job.source}' AND split = '{job.config.data.evaluate_on}'"

"""`lakesight train`: distributed training of the run's model, tracked and registered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.progress import progress, training_poll
from jobs.shard import run_shard
from vlm.config import Config

if TYPE_CHECKING:
    from pipelines.formats.run_folder import RunFolder
    from pipelines.tracking.registry import ModelVersion

SHOWN = ("train/loss", "val/loss", "val/blind_gap")


class TrainReport(Config):
    """A finished run and the model version it became."""

    run_folder: str
    run_id: str
    model_name: str
    model_version: str
    trained: bool
    """False when a finished run of the same model, data and settings was found."""
    steps: int
    world_size: int
    train_seconds: float
    metrics: dict[str, float]


class PreparedReport(Config):
    """A run folder whose ranks somebody else starts."""

    run_folder: str
    ranks: int
    """How many have to be started: platform.ranks."""


def train(
    *,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
    launch: Annotated[
        bool,
        typer.Option("--launch/--no-launch", help="Start the ranks; or write the run folder alone, for torchrun."),
    ] = True,
) -> None:
    """Train on distributed ranks; register the model.

    The same command finds a finished run again, and goes on with an unfinished one from its last checkpoint. With
    --no-launch the ranks are yours to start; the same command without it then registers the model.

    \b
    Example:
      lakesight train --run demo --set train.steps=2000 --set train.seed=1
    """
    with open_job(run, platform, overrides, as_json) as job:
        if launch:
            job.finish(run_train(job), "evaluate")
            return
        folder, ranks = prepared(job).path, job.config.platform.ranks
        job.screen.report(PreparedReport(run_folder=str(folder), ranks=ranks))
        job.screen.line("prepared", f"{folder}, for {ranks} ranks")
        job.screen.line("next", f"torchrun --nproc-per-node {ranks} -m pipelines.worker.main --run-dir {folder}")
        job.screen.line("then", job.command("train"))


def prepared(job: Job) -> RunFolder:
    """The shards, and the run folder as its ranks need it."""
    from pipelines.driver.train.run import prepare

    config = job.config
    learn_from = run_shard(job, "train", config.model.image)
    same = config.data.validate_on == "train"  # three pictures to be learned by heart
    validate_on = learn_from if same else run_shard(job, config.data.validate_on, config.model.image)
    return prepare(config, job.platform, learn_from, validate_on)


def run_train(job: Job) -> TrainReport:
    """The stages train and register."""
    from pipelines.driver.train.run import finished_result, launch
    from pipelines.tracking.registry import register
    from pipelines.tracking.runs import follow

    config, run = job.config, prepared(job)
    found = finished_result(run)
    # A finished run is followed too: if MLflow missed the end of it, it hears of it now.
    with (
        follow(run, config, job.platform) as run_id,
        progress("train", training_poll(run), config.train.steps),
    ):
        result = found or launch(run, job.platform, job.spark)
    figures = "  ".join(f"{name} {result.metrics[name]:.3f}" for name in SHOWN if name in result.metrics)
    how = f"found finished in {run.path}" if found else f"{result.world_size} ranks, {result.seconds:.0f} s"
    job.screen.line("train", f"{result.step:,} steps, {how}")
    job.screen.line("", figures)
    version: ModelVersion = register(run, run_id, job.platform)
    job.screen.line("register", f"{version.name} version {version.version}")
    return TrainReport(
        run_folder=str(run.path),
        run_id=run_id,
        model_name=version.name,
        model_version=version.version,
        trained=found is None,
        steps=result.step,
        world_size=result.world_size,
        train_seconds=result.seconds,
        metrics=result.metrics,
    )

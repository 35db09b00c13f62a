"""`lakesight train`: train the run's model on distributed ranks, log the run to MLflow and register the model."""

from __future__ import annotations

import logging
from contextlib import suppress
from glob import escape
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job, refuse_options
from jobs.job_run import RecordOption, check_job_run, record_trained_version
from jobs.next_commands import evaluate_version
from jobs.prepared import (
    FinishOption,
    LaunchOption,
    PreparedAsOption,
    announce_prepared,
    check_options,
    read_finished,
)
from jobs.progress import poll_training, show_elapsed, show_progress
from jobs.replay import run_replay
from jobs.shard import run_shard
from pipelines.errors import LakesightError, UserError
from vlm.config import Config

if TYPE_CHECKING:
    from pipelines.formats.run_folder import RunFolder
    from pipelines.tracking.registry import ModelVersion

logger = logging.getLogger(__name__)

SHOWN_METRICS = ("train/loss", "train/cider", "val/loss", "val/blind_gap")


class TrainReport(Config):
    """Report of `lakesight train`: the finished training run and the registered model version."""

    run_folder: str
    run_id: str
    model_name: str
    model_version: str
    trained: bool
    """Whether the command trained; false if it reused a finished run, which is always the case with --finish."""
    steps: int
    world_size: int
    train_seconds: float
    metrics: dict[str, float]


def train(
    *,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
    launch: LaunchOption = True,
    finish: FinishOption = False,
    prepared_as: PreparedAsOption = None,
    replay_step: Annotated[
        int | None,
        typer.Option(
            "--replay-step",
            help="Only repeat this training step, and show the loss of each of its pictures.",
            metavar="STEP",
        ),
    ] = None,
    job_run: RecordOption = None,
) -> None:
    """Train on distributed ranks and register the model.

    Run the same command again to resume an interrupted run from its last checkpoint; a finished run is reused. With
    --no-launch, the command only writes the run folder. Start the ranks of this folder with torchrun, then run the
    command again with --finish to register the model.

    With --replay-step, the command trains again in a temporary folder: from the last checkpoint before the given step
    to this step. The command then shows which pictures have a loss that is not finite. The replay does not change the
    run.

    \b
    Example:
      lakesight train --run demo --set train.steps=2000 --set train.seed=1
    """
    refuse_options({"--replay-step": None if launch else replay_step}, "--no-launch starts no training")
    with open_job(run, platform, overrides, as_json) as job:
        check_options(launch=launch, finish=finish, prepared_as=prepared_as, replay_step=replay_step)
        if job_run is not None:
            check_job_run(job_run, registers=launch and replay_step is None)
        if replay_step is not None:
            _require_pictures(job)
            job.output.report(run_replay(job, prepare_run(job, keep_run_file=True), replay_step))
            return
        if not launch:
            announce_prepared(job, prepare_run(job), prepared_as)
            return
        report = run_train(job, read_finished(job, prepared_as) if finish else None)
        if job_run is not None:
            record_trained_version(job, job_run, report.model_version)
        job.output.report(report)
        job.output.next(evaluate_version(job, report.model_version))


def _require_pictures(job: Job) -> None:
    if job.config.model.text_only:
        raise UserError(
            "no step can be replayed, because the run trains on text",
            where="--replay-step",
            got="model.text_only is true",
            fix="leave --replay-step out: a replay shows the losses of pictures",
        )


def prepare_run(job: Job, *, keep_run_file: bool = False) -> RunFolder:
    """Write the shards for training and validation, then write the run folder that ranks read when they start.

    With `keep_run_file`, the function does not change a run.json that an earlier command has written.
    """
    from pipelines.driver.train.run import check_config, prepare

    config = job.config
    check_config(config)
    train_shards = run_shard(job, "train", config.model.image)
    same_split = config.data.validate_on == "train"  # as in run `seemore`, which memorises three pictures
    validation_shards = train_shards if same_split else run_shard(job, config.data.validate_on, config.model.image)
    return prepare(config, job.platform, train_shards, validation_shards, keep_run_file=keep_run_file)


def run_train(job: Job, finished: RunFolder | None = None) -> TrainReport:
    """Run the train stage: train the model or reuse a finished run, log the run to MLflow and register the model.

    If `finished` is given, it is a run folder whose ranks have finished. If `finished` is None, the function prepares a
    run folder.

    Training starts even if the tracking server is down, but does not start if the tracking server refuses the user.
    """
    from pipelines.driver.train.run import check_config, launch
    from pipelines.driver.train.run_folders import finished_result
    from pipelines.formats.run_files.unregistered import Unregistered
    from pipelines.formats.run_folder import write_json
    from pipelines.formats.run_owner import own_run
    from pipelines.tracking.outage import TrackingDown
    from pipelines.tracking.registry import register
    from pipelines.tracking.runs import follow
    from pipelines.tracking.server import connect

    check_config(job.config)
    with suppress(TrackingDown):
        connect(job.platform)
    config, run = job.config, finished or prepare_run(job)
    wanted = Unregistered(checkpoint=config.train.register_, generation=config.model.generation)
    with own_run(run):
        write_json(run.unregistered, wanted)
        reused = finished_result(run)
        # A reused run may have other generation settings than this command. A reused run is logged to MLflow too,
        # because MLflow may not have received the run's last metrics.
        stored = run.read_run().config
        precision = config.train.model_copy(update={"precision": stored.train.precision})  # `auto` was resolved
        logged = config.model_copy(update={"model": stored.model, "train": precision})
        with (
            follow(run, logged, job.platform, may_be_down=reused is None) as follower,
            show_progress("train", poll_training(run, config.train), config.train.steps),
        ):
            result = reused or launch(run, job.platform, lambda: job.spark)
        figures = "  ".join(f"{name} {result.metrics[name]:z.3f}" for name in SHOWN_METRICS if name in result.metrics)
        detail = f"finished run reused: {run.path}" if reused else f"{result.world_size} ranks, {result.seconds:.0f} s"
        job.output.line("train", f"{result.step:,} steps, {detail}")
        job.output.line("", figures)
        with show_elapsed("register"):
            version: ModelVersion = register(run, follower.run_id, job.platform, wanted.checkpoint, wanted.generation)
        run.unregistered.unlink(missing_ok=True)
    job.output.line("register", f"{version.name} version {version.version}")
    return TrainReport(
        run_folder=str(run.path),
        run_id=follower.run_id,
        model_name=version.name,
        model_version=version.version,
        trained=reused is None,
        steps=result.step,
        world_size=result.world_size,
        train_seconds=result.seconds,
        metrics=result.metrics,
    )


def register_checkpoint(job: Job, which: str, step: int) -> str:
    """Return the number of the model version that contains the checkpoint of step `step`, from the training run of
    version `which`. If the checkpoint has no model version yet, register one.

    Raises:
        UserError: there is no version `which`, its run folder does not exist, or the run has not kept the checkpoint.
    """
    from pipelines.driver.train.run_folders import finished_result
    from pipelines.formats.run_folder import RunFolder
    from pipelines.formats.run_owner import own_run
    from pipelines.tracking.download import download
    from pipelines.tracking.registry import GENERATION_TAG, register, resolve
    from vlm.checkpoint import load_config

    register_finished_runs(job)
    trained = resolve(job.platform, job.model_name, which)
    run = RunFolder(job.platform.folder("runs") / trained.tags.get("run", "unknown"))
    if finished_result(run) is None:
        raise UserError(
            "the training of the model version is not in this home folder",
            where=str(run.path),
            got="the folder has no finished training run",
            fix=f"choose a version that was trained in this home folder, or run `{job.command('train')}`",
        )
    generation = None
    if GENERATION_TAG in trained.tags:
        generation = load_config(download(job.platform, trained).folder).generation
    with own_run(run):
        version = register(run, trained.run_id, job.platform, step, generation)
    job.output.line("register", f"checkpoint of step {step:,}: {version.name} version {version.version}")
    return version.version


def register_finished_runs(job: Job) -> None:
    """Log and register finished training runs that an earlier `train` command has left without a model version.

    A finished training run has no model version if the `train` command was killed, or if the tracking server was down.
    The registered checkpoint and generation settings are those of the interrupted command. If a run cannot be
    registered for another reason than a server that is down, log a warning.

    Raises:
        TrackingDown: the tracking server is down.
    """
    markers = sorted(job.platform.folder("runs").glob(f"{escape(job.config.name)}-*/unregistered"))
    if not markers:
        return  # most commands have nothing to register, and importing MLflow takes seconds
    from pipelines.driver.train.run_folders import finished_result
    from pipelines.formats.run_files.unregistered import read_unregistered
    from pipelines.formats.run_folder import RunFolder
    from pipelines.formats.run_owner import own_run
    from pipelines.tracking.outage import TrackingDown
    from pipelines.tracking.registry import register
    from pipelines.tracking.runs import follow

    for marker in markers:
        run = RunFolder(marker.parent)
        try:
            config = run.read_run().config
            if config.name != job.config.name or finished_result(run) is None:
                continue
            with own_run(run):
                with follow(run, config, job.platform, may_be_down=False) as follower:
                    logger.info("the training run %s is finished, but its model was not registered", run.path)
                wanted = read_unregistered(run)
                register(run, follower.run_id, job.platform, wanted.checkpoint, wanted.generation)
                marker.unlink(missing_ok=True)
        except TrackingDown:
            raise
        except LakesightError as error:
            logger.warning("the model of training run %s is not registered: %s", run.path, error)

"""Replay of the training up to one step, in a temporary run folder inside the original run folder. The original run
stays unchanged."""

from __future__ import annotations

import importlib
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from pipelines.driver.train.failure import diagnose_failure, root_failure, wait_for_failure_records
from pipelines.driver.train.launch import check_slots, run_ranks
from pipelines.errors import UserError
from pipelines.formats.run_files.replay import ReplayedRows, ReplayRequest, replay_request, replayed_rows
from pipelines.formats.run_folder import RunFolder, read_json, step_of, write_json
from pipelines.platform import Launch

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyspark.sql import SparkSession

SHARD_FOLDERS = ("train_shards", "validate_shards")
"""Fields of run.json that contain the paths of shard folders."""
NOT_FINITE = "NotFiniteError"
"""Name of the exception in a failure record if the loss was not finite."""


class Replay(NamedTuple):
    """Result of a replay, with the replayed rows of each rank.

    `from_step` is the step of the checkpoint from which the replay started, or 0 without a checkpoint. `error` is empty
    if the replay had no error.
    """

    from_step: int
    ranks: list[ReplayedRows]
    error: str


def replay_rank(run_folder: str) -> None:
    """Run one rank of a replay. The launcher calls this function in each rank."""
    importlib.import_module("pipelines.worker.main").replay_rank(run_folder)


def replay_step(run: RunFolder, launch: Launch, open_spark: Callable[[], SparkSession], step: int) -> Replay:
    """Repeat the training up to a step, from the last checkpoint before this step, and return the loss of each row.

    The caller must own the run (`run_owner.own_run`). The replay has as many ranks as the run, because each rank draws
    different random numbers.

    Raises:
        UserError: the run has no such step, or the cluster has too few slots.
        TrainingFailed: the replay failed for a different reason than a loss that is NaN or infinite.
    """
    file = run.read_run()
    if not 0 <= step < file.config.train.steps:
        raise UserError(
            "the training run has no step with this number",
            where="--replay-step",
            got=str(step),
            fix=f"choose a step from 0 to {file.config.train.steps - 1}",
        )
    launch = replace(launch, ranks=file.world_size)
    check_slots(open_spark, launch)
    copy = RunFolder(run.path / "replay")
    shutil.rmtree(copy.path, ignore_errors=True)
    try:
        earlier = [path for path in run.finished_checkpoints() if step_of(path) <= step]
        if earlier:
            shutil.copytree(earlier[-1], copy.checkpoints / earlier[-1].name)
        folders = {name: str(run.shard_folder(getattr(file, name)).resolve()) for name in SHARD_FOLDERS}
        write_json(copy.run_file, file.model_copy(update=folders))
        shutil.copyfile(run.tokenizer, copy.tokenizer)
        if file.config.train.rewards_cider:
            shutil.copyfile(run.cider, copy.cider)
        write_json(replay_request(copy), ReplayRequest(step=step))
        error = run_ranks(copy, open_spark, launch, replay_rank)
        wait_for_failure_records(copy)
        root = root_failure(copy)
        done = all(replayed_rows(copy, rank).exists() for rank in range(launch.ranks))
        if not done or (root and root.exception != NOT_FINITE) or (error and not root):
            raise diagnose_failure(copy, launch.ranks, error) from error
        ranks = [read_json(replayed_rows(copy, rank), ReplayedRows) for rank in range(launch.ranks)]
        return Replay(step_of(earlier[-1]) if earlier else 0, ranks, root.message if root else "")
    finally:
        shutil.rmtree(copy.path, ignore_errors=True)

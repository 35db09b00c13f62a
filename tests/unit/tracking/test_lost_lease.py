"""Tests that a process that has lost its run to another process does not change the MLflow run of the new owner."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from local_platforms import open_local
from tiny_runs import tiny_run, write_run, write_shards

from pipelines.errors import StageFailed, TrainingFailed
from pipelines.formats import run_owner
from pipelines.formats.run_folder import RunFolder, write_json
from pipelines.formats.run_owner import Lease, own_run
from pipelines.platform import Platform
from pipelines.tracking import runs
from pipelines.tracking.server import connect

CONFIG = tiny_run()
ELSEWHERE = Lease(host="elsewhere", pid=os.getpid(), boot="another kernel", owner="other")


@pytest.fixture
def platform(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Platform:
    return open_local(monkeypatch, tmp_path / "home", database=empty_database)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    shards = write_shards(tmp_path / "shards", rows=9)
    return write_run(tmp_path / "run", CONFIG, shards, shards)


def train_until_lost(run: RunFolder) -> None:
    """Let another process take over the run, and train until this process notices."""
    while True:
        write_json(run.launcher, ELSEWHERE)


def fail_before_loss(run: RunFolder) -> None:
    """Let another process take over the run, and fail with a missing file before this process notices the loss."""
    write_json(run.launcher, ELSEWHERE)
    raise TrainingFailed("rank 0 raised FileNotFoundError", where="host h")


@pytest.mark.parametrize(
    ("train", "renew_seconds", "error"),
    [(train_until_lost, 0.05, StageFailed), (fail_before_loss, 600, TrainingFailed)],
)
def test_the_mlflow_run_of_a_training_that_another_process_continues_stays_unchanged(
    platform: Platform,
    run: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    train: Callable[[RunFolder], None],
    renew_seconds: float,
    error: type[Exception],
) -> None:
    monkeypatch.setattr(run_owner, "RENEW_SECONDS", renew_seconds)
    with pytest.raises(error), own_run(run), runs.follow(run, CONFIG, platform):
        train(run)
    logged = connect(platform).get_run(runs.logged_ids(run)[0])
    assert logged.info.status == "RUNNING"
    assert runs.CAUSE_TAG not in logged.data.tags

"""Tests that replaying a training step repeats the step exactly, and names the pictures whose loss is not finite."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import no_spark, runs_in

from pipelines.config import OptimizerConfig
from pipelines.driver.train.failure import diagnose_failure
from pipelines.driver.train.launch import run_rank, run_ranks
from pipelines.driver.train.replay import replay_step
from pipelines.errors import UserError
from pipelines.formats.run_folder import Metrics, RunFolder, read_json
from pipelines.platform import Launch

pytestmark = [pytest.mark.faults, pytest.mark.matrix]

TWO_RANKS = Launch(2, local_mode=True, use_gpu=False)


def files_of(run: RunFolder) -> dict[str, bytes]:
    return {str(path.relative_to(run.path)): path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def test_replaying_a_training_step_gives_the_logged_loss_and_does_not_change_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs_in(tmp_path, monkeypatch)(log_every=1, checkpoint_every=8)
    assert run_ranks(run, no_spark, TWO_RANKS, run_rank) is None
    before = files_of(run)
    found = replay_step(run, TWO_RANKS, no_spark, 10)
    assert files_of(run) == before
    assert (found.from_step, found.error) == (8, "")
    rows = [row for rank in found.ranks for row in rank.rows]
    assert len(rows) == 4
    loss = sum((row.loss or 0) * row.tokens for row in rows) / sum(row.tokens for row in rows)
    assert loss == pytest.approx(read_json(run.metrics(11), Metrics).values["train/loss"], rel=1e-5)
    with pytest.raises(UserError, match="choose a step from 0 to 11"):
        replay_step(run, TWO_RANKS, no_spark, 12)


def test_the_error_of_a_diverged_training_names_the_pictures_and_a_step_replay_shows_their_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs_in(tmp_path, monkeypatch)(optimizer=OptimizerConfig(lr=1e30, warmup_steps=0))
    error = run_ranks(run, no_spark, TWO_RANKS, run_rank)
    failed = str(diagnose_failure(run, 2, error))
    assert "training diverged" in failed
    assert "`lakesight train --replay-step 1`" in failed
    found = replay_step(run, TWO_RANKS, no_spark, 1)
    assert "training diverged" in found.error
    [named] = [rank for rank in found.ranks if f"pictures of rank {rank.rank}: " in failed]
    assert ", ".join(row.image_id for row in named.rows) in failed
    assert all(row.loss is None for row in named.rows)

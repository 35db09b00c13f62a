"""The run folder: files whole or absent, read back in order."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.formats.run_folder import (
    CaptionSample,
    CaptionSamples,
    Failure,
    Heartbeat,
    Metrics,
    RankFile,
    RunDir,
    read_json,
    touch_heartbeat,
    write_json,
)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def failure(rank: int, failed_at: float) -> Failure:
    return Failure(
        rank=rank,
        host="a",
        pid=1,
        exception="ValueError",
        message="no",
        traceback="",
        step=3,
        failed_at=failed_at,
        consequence=False,
    )


def test_a_file_reads_back_as_it_was_written(run: RunDir) -> None:
    who = RankFile(rank=1, host="a", pid=7, started_at=1.5)
    write_json(run.rank(1), who)
    assert read_json(run.rank(1), RankFile) == who
    assert run.read_ranks() == [who]


def test_a_write_that_fails_leaves_the_file_as_it_was(run: RunDir) -> None:
    write_json(run.tracking, {"run_id": "a"})
    with pytest.raises(TypeError):
        write_json(run.tracking, {"run_id": object()})
    assert run.tracking.read_text() == '{\n  "run_id": "a"\n}'
    assert [path.name for path in run.path.iterdir()] == ["tracking.json"]


def test_a_missing_or_foreign_file_is_the_users_mistake(run: RunDir) -> None:
    with pytest.raises(UserError, match=r"run\.json is missing"):
        run.read_run()
    write_json(run.run, {"rank": "x"})
    with pytest.raises(UserError, match="is not a RunFile"):
        run.read_run()


def test_metrics_and_samples_come_in_the_order_of_steps_and_go_on_after_one(run: RunDir) -> None:
    for step in (100, 9, 10_000_000_000):
        write_json(run.metrics(step), Metrics(step=step, time=0.0, values={"train/loss": 1.0}))
        sample = CaptionSample(row=0, image_id="a/1", text="red", caption="green")
        write_json(run.samples(step), CaptionSamples(step=step, samples=(sample,)))
    assert [m.step for m in run.read_metrics()] == [9, 100, 10_000_000_000]
    assert [m.step for m in run.read_metrics(after=9)] == [100, 10_000_000_000]
    assert [s.step for s in run.read_samples(after=100)] == [10_000_000_000]


def test_checkpoints_are_listed_by_step_and_unfinished_ones_are_not(run: RunDir) -> None:
    assert run.finished_checkpoints() == []
    for name in ("step_1000000", "step_000200", ".step_000300.tmp", "step_000300.tmp"):
        (run.checkpoints / name).mkdir(parents=True)
    assert [path.name for path in run.finished_checkpoints()] == ["step_000200", "step_1000000"]


def test_failures_come_earliest_first(run: RunDir) -> None:
    for rank, failed_at in ((0, 3.0), (1, 1.0), (2, 2.0)):
        write_json(run.failure(rank), failure(rank, failed_at))
    assert [f.rank for f in run.read_failures()] == [1, 2, 0]


def test_a_heartbeat_says_step_and_time(run: RunDir) -> None:
    assert run.read_heartbeat(0) is None
    touch_heartbeat(run, 0, 12)
    beat = run.read_heartbeat(0)
    assert isinstance(beat, Heartbeat)
    assert beat.step == 12


def test_a_new_attempt_keeps_what_belongs_to_the_run_and_sets_the_rest_aside(run: RunDir) -> None:
    for attempt in (1, 2):
        write_json(run.failure(0), failure(0, attempt))
        write_json(run.metrics(1), Metrics(step=1, time=0.0, values={}))
        run.checkpoint(1).mkdir(parents=True, exist_ok=True)
        run.set_aside()
        assert run.read_failures() == []
        kept = read_json(run.path / "attempts" / str(attempt) / "failures" / "rank-0.json", Failure)
        assert kept.failed_at == attempt
    assert [m.step for m in run.read_metrics()] == [1]
    assert run.finished_checkpoints() == [run.checkpoint(1)]

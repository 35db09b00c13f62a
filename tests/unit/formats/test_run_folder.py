"""Tests that files of a run folder are written atomically and read in the order of steps."""

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
    RunFolder,
    read_json,
    write_heartbeat,
    write_json,
)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


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


def test_reading_a_written_json_file_gives_an_equal_object(run: RunFolder) -> None:
    content = RankFile(rank=1, host="a", pid=7, started_at=1.5)
    write_json(run.rank(1), content)
    assert read_json(run.rank(1), RankFile) == content
    assert run.read_ranks() == [content]


def test_a_failed_write_of_a_run_file_keeps_the_previous_file(run: RunFolder) -> None:
    write_json(run.tracking, {"run_id": "a"})
    with pytest.raises(TypeError):
        write_json(run.tracking, {"run_id": object()})
    assert run.tracking.read_text() == '{\n  "run_id": "a"\n}'
    assert [path.name for path in run.path.iterdir()] == ["tracking.json"]


def test_reading_a_missing_json_file_or_a_file_of_another_kind_is_a_user_error(run: RunFolder) -> None:
    with pytest.raises(UserError, match=r"run\.json is missing"):
        run.read_run()
    write_json(run.run_file, {"rank": "x"})
    with pytest.raises(UserError, match="does not contain a valid RunFile"):
        run.read_run()


def test_metrics_and_samples_after_a_given_step_are_read_in_step_order(run: RunFolder) -> None:
    for step in (100, 9, 10_000_000_000):
        write_json(run.metrics(step), Metrics(step=step, time=0.0, values={"train/loss": 1.0}))
        sample = CaptionSample(row=0, image_id="a/1", text="red", caption="green")
        write_json(run.samples(step), CaptionSamples(step=step, samples=(sample,)))
    assert [m.step for m in run.read_metrics()] == [9, 100, 10_000_000_000]
    assert [m.step for m in run.read_metrics(after=9)] == [100, 10_000_000_000]
    assert [s.step for s in run.read_samples(after=100)] == [10_000_000_000]


def test_only_complete_checkpoints_are_listed_in_step_order(run: RunFolder) -> None:
    assert run.finished_checkpoints() == []
    for name in ("step_1000000", "step_000200", ".step_000300.tmp", "step_000300.tmp"):
        (run.checkpoints / name).mkdir(parents=True)
    assert [path.name for path in run.finished_checkpoints()] == ["step_000200", "step_1000000"]


def test_failure_records_are_read_in_the_order_of_their_time(run: RunFolder) -> None:
    for rank, failed_at in ((0, 3.0), (1, 1.0), (2, 2.0)):
        write_json(run.failure(rank), failure(rank, failed_at))
    assert [f.rank for f in run.read_failures()] == [1, 2, 0]


def test_a_heartbeat_file_contains_the_current_step_and_the_time(run: RunFolder) -> None:
    assert run.read_heartbeat(0) is None
    write_heartbeat(run, 0, 12)
    beat = run.read_heartbeat(0)
    assert isinstance(beat, Heartbeat)
    assert beat.step == 12


def test_archiving_a_training_attempt_leaves_checkpoints_and_metrics_and_samples_in_place(run: RunFolder) -> None:
    for attempt in (1, 2):
        write_json(run.failure(0), failure(0, attempt))
        write_json(run.metrics(1), Metrics(step=1, time=0.0, values={}))
        run.checkpoint(1).mkdir(parents=True, exist_ok=True)
        run.archive_attempt()
        assert run.read_failures() == []
        kept = read_json(run.path / "attempts" / str(attempt) / "failures" / "rank-0.json", Failure)
        assert kept.failed_at == attempt
    assert [m.step for m in run.read_metrics()] == [1]
    assert run.finished_checkpoints() == [run.checkpoint(1)]

"""Tests that a process that follows a running training opens only new files and lists no folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from file_calls import counted_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import tiny_run

from pipelines.formats.run_files.new_files import MAX_SAMPLED, new_metrics, new_samples, sample_metrics
from pipelines.formats.run_folder import CaptionSamples, Metrics, RunFolder, write_heartbeat, write_json

SETTINGS = tiny_run(steps=40, log_every=2, validate_every=7).train


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def write(run: RunFolder, *steps: int) -> None:
    for step in steps:
        write_json(run.metrics(step), Metrics(step=step, time=0.0, values={}))


def read(run: RunFolder, after: int = -1) -> list[int]:
    return [metrics.step for metrics in new_metrics(run, SETTINGS, after)]


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 20), st.none() | st.integers(1, 20))
@settings(max_examples=30)
def test_the_expected_steps_are_the_steps_at_which_the_training_loop_writes_files(
    steps: int, log: int, validate: int, score: int | None
) -> None:
    train = tiny_run(steps=steps, log_every=log, validate_every=validate, score_every=score).train
    every = [validate, *([score] if score else [])]
    for next_step, intervals in ((train.next_validated_step, every), (train.next_logged_step, [log, *every])):
        found, step = [], 0
        while step < steps:
            found.append(step := next_step(step))
        written = [done for done in range(1, steps + 1) if done == steps or any(done % n == 0 for n in intervals)]
        assert found == written


def test_a_reader_of_a_running_training_opens_only_new_files_and_lists_no_folder(run: RunFolder) -> None:
    write(run, *range(2, 30, 2), 7, 14, 21)
    assert read(run) == sorted({*range(2, 30, 2), 7, 21})
    write(run, 30)
    write_json(run.samples(28), CaptionSamples(step=28, samples=()))
    write_heartbeat(run, 0, 31)
    with counted_calls(run.path) as calls:
        assert read(run, after=28) == [30]
        assert read(run, after=30) == []
        assert [samples.step for samples in new_samples(run, SETTINGS, 21)] == [28]
    assert calls.listed == []
    assert {path for path in calls.opened if "heartbeat" not in path} == {str(run.metrics(30)), str(run.samples(28))}


def test_metric_files_after_a_missing_file_are_found_once_the_rank_has_passed_the_missing_step(run: RunFolder) -> None:
    write(run, 20, 21)  # this run continues an earlier run, so its first file is the file of step 20
    assert read(run) == []
    write_heartbeat(run, 0, 22)
    assert read(run) == [20, 21]


def test_the_last_metric_files_of_a_complete_run_are_read_only_once(run: RunFolder) -> None:
    write(run, 38, 40)
    write_heartbeat(run, 0, 40)
    assert read(run, after=36) == [38, 40]
    assert read(run, after=40) == []


def test_the_curves_of_a_long_run_are_read_from_few_files_and_contain_all_known_metrics(run: RunFolder) -> None:
    train = tiny_run(steps=1000, log_every=1, validate_every=100).train
    write(run, *range(1, 1001))
    known = {step: Metrics(step=step, time=1.0, values={}) for step in range(900, 1001)}
    with counted_calls(run.path) as calls:
        found = sample_metrics(run, train, known)
    assert len(calls.opened) <= 2 * MAX_SAMPLED
    steps = [metrics.step for metrics in found]
    assert steps == sorted(steps)
    assert {*range(900, 1001), *range(100, 900, 100)} <= set(steps)

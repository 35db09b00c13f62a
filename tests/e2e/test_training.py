"""Tests of training without Spark, with torchrun or with ranks on the driver: results, checkpoints, and resuming."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import is_running, torchrun
from rank_faults import Fault, faulty_rank, slow_rank
from tiny_runs import MakeRun, no_spark, runs_in

from pipelines.driver.train.run import launch
from pipelines.formats.run_folder import Result, RunFolder, read_json
from pipelines.platform import Launch, Platform

# One process runs all tests of this file, so that the uninterrupted run is trained only once.
pytestmark = pytest.mark.xdist_group("training")


@pytest.fixture
def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRun:
    return runs_in(tmp_path, monkeypatch)


COLOURS = {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3}
AUGMENT = {"scale": [0.5, 1.0], "flip": 0.5, "flip_vertical": 0.5, "rotate": 0.5, "erase": 0.5, **COLOURS}
# Use three ranks: the order of the terms can change a floating-point sum only if there are at least three terms.
WHOLE: dict[str, Any] = {
    "ranks": 3,
    "batch_size": 6,
    "steps": 60,
    "log_every": 10,
    "validate_every": 30,
    "checkpoint_every": 5,
    "profile_steps": 2,
    "augment": AUGMENT,
    "label_smoothing": 0.1,
    "score_every": 30,
}
MEASURED = re.compile("per_second|data_wait|system/")
"""Pattern of the metrics that differ between two runs with equal configs, because they measure time or the machine."""
ENDLESS: dict[str, Any] = {"steps": 100_000, "validate_every": 100_000}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run that was never interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        run = runs_in(tmp_path_factory.mktemp("whole"), patch)(**WHOLE)
    ended = torchrun(run, 3)
    assert ended.returncode == 0, ended.stdout
    return run


@pytest.fixture
def two_ranks(platform: Platform) -> Platform:
    return replace(platform, launch=Launch(2, local_mode=True, use_gpu=False))


def without_rates(run: RunFolder) -> list[tuple[int, dict[str, float]]]:
    """Return the metrics of each step, without the metrics that match `MEASURED`."""
    return [
        (m.step, {key: value for key, value in m.values.items() if not MEASURED.search(key)})
        for m in run.read_metrics()
    ]


@pytest.mark.matrix
def test_ranks_started_by_torchrun_write_results_metrics_and_checkpoints(whole: RunFolder) -> None:
    result = read_json(whole.result, Result)
    assert (result.status, result.step, result.world_size) == ("ok", 60, 3)
    logged = {"train/loss", "train/lr", "train/grad_norm", "val/loss", "val/blind_gap", "val/cider"}
    assert logged <= result.metrics.keys()
    assert [m.step for m in whole.read_metrics()] == [10, 20, 30, 40, 50, 60]
    assert [(s.step, len(s.samples)) for s in whole.read_samples()] == [(30, 2), (60, 2)]
    losses_by_step = {m.step: m.values["val/loss"] for m in whole.read_metrics() if "val/loss" in m.values}
    best = whole.checkpoint(min(losses_by_step, key=losses_by_step.__getitem__))
    assert set(whole.finished_checkpoints()) == {whole.checkpoint(55), whole.checkpoint(60), best}
    assert Path(result.best_checkpoint) == best
    assert Path(result.checkpoint) == whole.checkpoint(60)
    assert all(rank.ended for rank in whole.read_ranks())
    assert all("from step 0 to 60" in whole.log(rank).read_text() for rank in range(3))
    assert 0 <= result.metrics["train/data_wait"] < 1
    assert 0.1 < result.metrics["system/memory_gb"] < 4
    with gzip.open(whole.profile) as trace:
        names = {event["name"] for event in json.load(trace)["traceEvents"]}
    assert {"ProfilerStep#5", "ProfilerStep#6", "aten::mm"} <= names
    assert "ProfilerStep#7" not in names


POINTS = random.Random(0)
KILLS = [(POINTS.randrange(60), POINTS.randrange(3)) for _ in range(10)]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("step", "rank"),
    [pytest.param(*kill, marks=pytest.mark.matrix if index else []) for index, kill in enumerate(KILLS)],
)
def test_a_run_that_is_killed_and_restarts_equals_the_uninterrupted_run_bit_for_bit(
    whole: RunFolder, make_run: MakeRun, platform: Platform, step: int, rank: int
) -> None:
    three_ranks = replace(platform, launch=Launch(3, local_mode=True, use_gpu=False))
    broken = make_run(fault=Fault(kind="kill", rank=rank, step=step), max_restarts=1, **WHOLE)
    assert launch(broken, three_ranks, no_spark, faulty_rank).step == 60

    assert (broken.path / "struck.json").exists()
    assert step < 20 or re.search(r"from step [1-9]\d* to 60", broken.log(0).read_text())
    assert (broken.path / "attempts" / "1" / "logs" / "rank-0.log").exists()
    assert_equal(whole, broken)


@pytest.mark.matrix
def test_a_damaged_checkpoint_is_renamed_and_the_run_resumes_from_the_previous_checkpoint(
    whole: RunFolder, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "copy")
    shutil.copytree(whole.path, run.path)
    run.result.unlink()
    state = run.checkpoint(60) / "training.safetensors"
    changed = bytearray(state.read_bytes())
    changed[-1] ^= 1
    state.write_bytes(changed)
    ended = torchrun(run, 3)
    assert ended.returncode == 0, ended.stdout
    assert re.search("checkpoint is damaged.*training.safetensors has changed since it was written", ended.stdout)
    assert "from step 55 to 60" in run.log(0).read_text()
    assert [path.name for path in run.damaged_checkpoints()] == ["damaged_step_000060"]
    assert_equal(whole, run)


def assert_equal(whole: RunFolder, other: RunFolder) -> None:
    """Check that two runs have the same weights, optimizer state, metrics and sample captions, bit for bit."""
    for name in ("model.safetensors", "training.safetensors"):
        assert (whole.checkpoint(60) / name).read_bytes() == (other.checkpoint(60) / name).read_bytes()
    assert without_rates(whole) == without_rates(other)
    assert list(whole.read_samples()) == list(other.read_samples())


@pytest.mark.matrix
def test_a_rank_does_not_time_out_while_rank_0_captions_longer_than_the_timeout(
    make_run: MakeRun, two_ranks: Platform
) -> None:
    # Six captions take at least 12 s. A rank that waits for another rank ends itself after 6 + 3 s without progress.
    run = make_run(steps=2, validate_every=2, checkpoint_every=2, caption_samples=6, timeout_seconds=6)
    assert launch(run, two_ranks, no_spark, slow_rank).step == 2
    assert [len(written.samples) for written in run.read_samples()] == [6]


@pytest.mark.faults
@pytest.mark.matrix
def test_interrupting_a_launch_ends_its_ranks_and_leaves_a_run_that_can_be_resumed(
    make_run: MakeRun, two_ranks: Platform
) -> None:
    run = make_run(**ENDLESS)
    threading.Thread(target=press_ctrl_c, args=(run,), daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        launch(run, two_ranks, no_spark)
    assert not any(is_running(rank.pid) for rank in run.read_ranks())
    assert run.finished_checkpoints()
    assert not run.result.exists()


def press_ctrl_c(run: RunFolder) -> None:
    """Send SIGINT to this process after the first checkpoint."""
    while not run.finished_checkpoints():
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)

"""Ranks for real: under torchrun, beside the driver, and on executors; and what the driver makes of their deaths."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import Fault, faulty_rank
from helpers import TEST_PATH, is_running, tiny_run, torchrun, write_run, write_shards
from pyspark.sql import SparkSession

from pipelines.driver.train import launch
from pipelines.driver.verdict import failure_of
from pipelines.errors import TrainingFailed, UserError
from pipelines.platform import Launch, Platform
from pipelines.rundir import Result, RunDir, read_json, write_json
from vlm import text
from vlm.build import build_model
from vlm.checkpoint import load_model, save_model

MakeRun = Callable[..., RunDir]


def runs_in(folder: Path) -> MakeRun:
    """Writes folders of tiny runs on the same shards."""
    train, validate = write_shards(folder / "train", rows=21), write_shards(folder / "val", rows=6)

    def make(name: str = "run", fault: Fault | None = None, **settings: Any) -> RunDir:
        run = write_run(folder / name, tiny_run(**settings), train, validate)
        if fault:
            write_json(run.path / "fault.json", fault)
        return run

    return make


@pytest.fixture
def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRun:
    """Writes the folder of a tiny run; its ranks can import the tests."""
    monkeypatch.setenv("PYTHONPATH", TEST_PATH)
    return runs_in(tmp_path)


# Three ranks: the order in which gradients are added up matters from three terms on.
WHOLE: dict[str, Any] = {
    "ranks": 3,
    "batch_size": 6,
    "steps": 60,
    "log_every": 10,
    "validate_every": 30,
    "checkpoint_every": 5,
}
ENDLESS: dict[str, Any] = {"steps": 100_000, "validate_every": 100_000}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that nothing interrupted."""
    run = runs_in(tmp_path_factory.mktemp("whole"))(**WHOLE)
    ended = torchrun(run, 3)
    assert ended.returncode == 0, ended.stdout
    return run


@pytest.fixture
def two_ranks(platform: Platform) -> Platform:
    return replace(platform, launch=Launch(2, local_mode=True, use_gpu=False))


def losses(run: RunDir) -> list[float]:
    return [m.values["train/loss"] for m in run.read_metrics() if "train/loss" in m.values]


def timeless(run: RunDir) -> list[tuple[int, dict[str, float]]]:
    """Metrics without rates."""
    return [
        (m.step, {key: value for key, value in m.values.items() if "per_second" not in key}) for m in run.read_metrics()
    ]


def seconds_since_fault(run: RunDir) -> float:
    return time.time() - float(json.loads((run.path / "struck.json").read_text())["time"])


def test_torchrun_alone_trains_to_a_result(whole: RunDir) -> None:
    result = read_json(whole.result, Result)
    assert (result.status, result.step, result.world_size) == ("ok", 60, 3)
    assert {"train/loss", "train/lr", "train/grad_norm", "val/loss", "val/blind_gap"} <= result.metrics.keys()
    assert [m.step for m in whole.read_metrics()] == [10, 20, 30, 40, 50, 60]
    assert [(s.step, len(s.samples)) for s in whole.read_samples()] == [(30, 2), (60, 2)]
    assert [path.name for path in whole.finished_checkpoints()] == ["step_000055", "step_000060"]
    assert Path(result.checkpoint) == whole.checkpoint(60)
    assert all(rank.ended for rank in whole.read_ranks())
    assert all("from step 0 to 60" in whole.log(rank).read_text() for rank in range(3))


@pytest.mark.faults
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    whole: RunDir, make_run: MakeRun, platform: Platform, spark: SparkSession
) -> None:
    three_ranks = replace(platform, launch=Launch(3, local_mode=True, use_gpu=False))
    broken = make_run(fault=Fault(kind="kill", rank=1), **WHOLE)
    with pytest.raises(TrainingFailed, match=r"rank 1 ended without a word at step [0-9]+.*kill -9"):
        launch(broken, three_ranks, spark, faulty_rank)
    assert seconds_since_fault(broken) < 60
    assert not broken.result.exists()
    assert launch(broken, three_ranks, spark).step == 60

    assert re.search(r"from step [1-9]\d* to 60", broken.log(0).read_text())
    assert (broken.path / "attempts" / "1" / "logs" / "rank-0.log").exists()
    for name in ("model.safetensors", "training.safetensors"):
        assert (whole.checkpoint(60) / name).read_bytes() == (broken.checkpoint(60) / name).read_bytes()
    assert timeless(whole) == timeless(broken)
    assert list(whole.read_samples()) == list(broken.read_samples())


def test_one_rank_and_two_learn_from_the_same_samples_in_the_same_order(make_run: MakeRun) -> None:
    model = tiny_run().model.model_dump()
    for part in (model["vision"], model["decoder"]):
        part["transformer"]["dropout"] = 0.0
    alone, together = (make_run(f"of-{ranks}", model=model, ranks=ranks, log_every=1) for ranks in (1, 2))
    assert torchrun(alone, 1).returncode == 0
    assert torchrun(together, 2).returncode == 0
    assert losses(alone) == pytest.approx(losses(together), rel=1e-4)


def test_an_adapter_tunes_a_model_on_two_ranks_and_what_comes_out_is_a_plain_one(
    make_run: MakeRun, tmp_path: Path
) -> None:
    config = tiny_run().model
    tokenizer = text.learn(config.text, ())
    torch.manual_seed(0)
    save_model(tmp_path / "base", build_model(config, tokenizer.vocab_size), tokenizer)
    adapter = {"pattern": "decoder.*", "rank": 4}
    optimizer = {"lr": 0.02, "warmup_steps": 2}
    run = make_run(start_from=str(tmp_path / "base"), adapter=adapter, precision="bf16", optimizer=optimizer, **FEW)
    ended = torchrun(run, 2)
    assert ended.returncode == 0, ended.stdout
    assert losses(run)[-1] < 0.8 * losses(run)[0]
    before, last = run.finished_checkpoints()
    assert {path.name for path in before.iterdir()} == {"adapter.json", "adapter.safetensors", *STATE_FILES}
    base, tuned = (load_model(folder)[0].state_dict() for folder in (tmp_path / "base", last))
    moved = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert moved == {f"decoder.{name}.weight" for name in ADAPTED}


FEW = {"steps": 30, "validate_every": 30, "checkpoint_every": 15}
STATE_FILES = {"training.json", "training.safetensors"}
ADAPTED = {"head", *(f"blocks.0.{name}" for name in ("attention.qkv", "attention.out", "mlp.up", "mlp.out"))}


@pytest.mark.faults
@pytest.mark.parametrize(
    ("kind", "rank", "message"),
    [
        ("raise", 1, "rank 1 failed at step [0-9]+.*ValueError"),
        ("leave", 1, "rank 1 failed at step [0-9]+.*SystemExit: left at step"),
        ("kill", 0, "rank 0 ended without a word at step [0-9]+.*kill -9"),
        ("exit", 1, "rank 1 ended without a word at step [0-9]+.*os._exit"),
        pytest.param("raise", 0, "rank 0 failed at step [0-9]+.*ValueError", marks=pytest.mark.matrix),
        pytest.param("leave", 0, "rank 0 failed at step [0-9]+.*SystemExit: left", marks=pytest.mark.matrix),
        pytest.param("exit", 0, "rank 0 ended without a word at step [0-9]+.*os._exit", marks=pytest.mark.matrix),
    ],
)
def test_a_rank_that_dies_ends_the_launch_within_a_minute_and_is_named(
    make_run: MakeRun, two_ranks: Platform, spark: SparkSession, kind: Any, rank: int, message: str
) -> None:
    run = make_run(fault=Fault(kind=kind, rank=rank), **ENDLESS)
    with pytest.raises(TrainingFailed, match=message) as raised:
        launch(run, two_ranks, spark, faulty_rank)
    assert seconds_since_fault(run) < 60
    assert "step_0" in raised.value.fix
    assert not any(is_running(r.pid) for r in run.read_ranks())


@pytest.mark.faults
def test_a_rank_that_hangs_is_named_when_the_time_of_the_others_runs_out(make_run: MakeRun) -> None:
    fault = Fault(kind="hang", rank=1)
    run = make_run(fault=fault, timeout_seconds=10, **ENDLESS)
    assert torchrun(run, 2, "faults").returncode != 0
    assert seconds_since_fault(run) < 60
    error = failure_of(run, 2, None)
    assert error.what.startswith("rank 1 hung at step")
    assert "sleep" in error.__notes__[0]


def test_a_loss_that_is_not_finite_ends_the_run_with_its_step(make_run: MakeRun) -> None:
    run = make_run(optimizer={"lr": 1e30, "warmup_steps": 0}, steps=50)
    assert torchrun(run, 1).returncode != 0
    assert not run.result.exists()
    error = failure_of(run, 1, None)
    assert "NotFiniteError" in error.got
    assert re.search(r"step \d+", error.got)


def test_a_damaged_shard_ends_the_run_before_the_first_step(make_run: MakeRun) -> None:
    run = make_run()
    shard = next(Path(run.read_run().train_shards).glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert torchrun(run, 1).returncode != 0
    assert "a training shard is damaged" in failure_of(run, 1, None).got


@pytest.mark.faults
def test_interrupting_a_launch_ends_its_ranks_and_leaves_a_run_to_go_on_with(
    make_run: MakeRun, two_ranks: Platform, spark: SparkSession
) -> None:
    run = make_run(**ENDLESS)
    threading.Thread(target=press_ctrl_c, args=(run,), daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        launch(run, two_ranks, spark)
    assert not any(is_running(rank.pid) for rank in run.read_ranks())
    assert run.finished_checkpoints()
    assert not run.result.exists()


def press_ctrl_c(run: RunDir) -> None:
    """Once the ranks are at work."""
    while not run.finished_checkpoints():
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.faults
def test_on_executors_a_killed_rank_is_named_and_too_few_slots_are_refused_at_once(
    make_run: MakeRun, platform: Platform, spark: SparkSession
) -> None:
    assert not platform.launch.local_mode
    run = make_run(fault=Fault(kind="kill", rank=1), **ENDLESS)
    three_ranks = replace(platform, launch=replace(platform.launch, ranks=3))
    with pytest.raises(UserError, match=r"too few slots for the ranks.*2 tasks at once, 3 needed"):
        launch(run, three_ranks, spark)
    with pytest.raises(TrainingFailed, match="rank 1 ended without a word"):
        launch(run, platform, spark, faulty_rank)
    assert seconds_since_fault(run) < 60
    assert not any(is_running(rank.pid) for rank in run.read_ranks())

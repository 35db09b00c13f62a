"""A run folder before launch: found again by what determines the run, refused when it cannot work."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_run, write_shards

from pipelines.config import LocalPlatformConfig
from pipelines.driver.launch import only_launch
from pipelines.driver.shard import ShardReport
from pipelines.driver.train import finished, prepare
from pipelines.errors import UserError
from pipelines.platform import Platform, local
from pipelines.rundir import LauncherFile, Result, RunDir, write_json
from pipelines.shards import Shards
from vlm import text


@pytest.fixture
def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Platform:
    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path / "home"))
    return local(LocalPlatformConfig())


@pytest.fixture
def report(tmp_path: Path) -> ShardReport:
    return as_report(write_shards(tmp_path / "shards", rows=8))


def as_report(shards: Shards) -> ShardReport:
    return ShardReport(
        folder=str(shards.folder),
        source="tiny",
        split="train",
        num_rows=len(shards),
        content_hash=shards.manifest.content_hash,
        dataset_version=3,
        reused=False,
        seconds=0.0,
    )


def test_the_same_run_is_found_again_and_another_one_is_not(
    laptop: Platform, report: ShardReport, tmp_path: Path
) -> None:
    run = prepare(tiny_run(), laptop, report, report)
    other_data = as_report(write_shards(tmp_path / "other", rows=9))
    assert prepare(tiny_run(), laptop, report, report) == run
    assert prepare(tiny_run(ranks=1), laptop, report, report) == run  # ranks change how fast, not what
    others = [
        prepare(tiny_run(seed=1), laptop, report, report),
        prepare(tiny_run(), laptop, other_data, report),
        prepare(tiny_run(), laptop, report, other_data),
    ]
    assert len({run, *others}) == 4
    assert run.path.parent == laptop.folder("runs")
    assert run.path.name.startswith("tiny-")


def test_run_and_tokenizer_are_all_a_rank_needs(laptop: Platform, report: ShardReport) -> None:
    run = prepare(tiny_run(), laptop, report, report)
    file = run.read_run()
    assert file.config == tiny_run()
    assert (file.train_shards, file.dataset_version, file.world_size) == (report.folder, 3, 2)
    assert text.load(run.tokenizer).decode(text.load(run.tokenizer).encode("red")) == "red"


def test_a_batch_that_ranks_cannot_share_is_refused_with_one_that_they_can(
    laptop: Platform, report: ShardReport
) -> None:
    with pytest.raises(UserError, match=r"5 rows for 2 ranks.*train\.batch_size=6"):
        prepare(tiny_run(batch_size=5), laptop, report, report)
    assert not laptop.folder("runs").exists()


@pytest.mark.parametrize(("train_rows", "validate_rows", "purpose"), [(0, 8, "learn from"), (8, 0, "validate on")])
def test_an_empty_split_is_refused(
    laptop: Platform, report: ShardReport, train_rows: int, validate_rows: int, purpose: str
) -> None:
    train, validate = (report.model_copy(update={"num_rows": rows}) for rows in (train_rows, validate_rows))
    with pytest.raises(UserError, match=f"there is nothing to {purpose}"):
        prepare(tiny_run(), laptop, train, validate)


def test_a_run_is_finished_when_its_result_and_its_checkpoint_are_there(laptop: Platform, report: ShardReport) -> None:
    run = prepare(tiny_run(), laptop, report, report)
    assert finished(run) is None
    result = Result(status="ok", step=12, world_size=2, checkpoint=str(run.checkpoint(12)), metrics={}, seconds=1.0)
    write_json(run.result, result)
    assert finished(run) is None
    run.checkpoint(12).mkdir(parents=True)
    assert finished(run) == result
    before = run.run.read_bytes()
    prepare(tiny_run(ranks=1), laptop, report, report)
    assert run.run.read_bytes() == before  # what a finished run says of itself stays true


def test_a_run_that_another_process_is_training_is_not_launched_twice(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    write_json(run.launcher, LauncherFile(host=socket.gethostname(), pid=sleeper.pid))
    with pytest.raises(UserError, match=f"process {sleeper.pid} on this host holds it"), only_launch(run):
        pass
    sleeper.kill()
    sleeper.wait()
    with only_launch(run):
        assert f'"pid": {os.getpid()}' in run.launcher.read_text()
    assert not run.launcher.exists()

"""Tests, with real processes, that no rank goes on training after its driver was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import starting_ranks
from processes import SUPPORT, TEST_PATH, is_running
from rank_faults import wait_for
from tiny_runs import no_spark, runs_in

from pipelines.child_process import start_ticks
from pipelines.driver.train import local_ranks
from pipelines.driver.train.local_ranks import run_local_ranks
from pipelines.driver.train.run import launch
from pipelines.formats.run_folder import Failure, RankFile, RunFolder, read_json, write_json
from pipelines.platform import Launch, Platform

ONE_RANK = Launch(1, local_mode=True, use_gpu=False)


def kill_driver_of(run: RunFolder, rank: str) -> int:
    """Start a driver, and kill the driver after its rank has started, but before the rank looks for the driver.

    Returns:
        The process id of the rank.
    """
    started = Path(f"{run.path}.started")
    command = [sys.executable, str(SUPPORT / "starting_ranks.py"), str(run.path), rank]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": TEST_PATH}) as driver:
        wait_for(lambda: started.exists() and bool(started.read_text()))
        driver.kill()
    return int(started.read_text())


def test_a_rank_whose_driver_was_killed_during_the_start_of_the_rank_ends_without_changing_the_run(
    tmp_path: Path,
) -> None:
    run = RunFolder(tmp_path / "run")
    pid = kill_driver_of(run, "late_rank")
    wait_for(lambda: not is_running(pid))
    assert not is_running(pid)
    assert [path.relative_to(run.path) for path in run.path.rglob("*")] == [Path("logs"), Path("logs/launcher.log")]
    assert "rank 0 ends, because the driver" in run.launcher_log.read_text()


def test_the_monitor_of_a_rank_notices_a_driver_that_was_killed_before_the_monitor_started(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    pid = kill_driver_of(run, "late_monitor")
    wait_for(lambda: not is_running(pid))
    assert not is_running(pid)
    assert read_json(run.failure(0), Failure).exception == "LauncherGone"


def test_a_new_launch_first_ends_the_ranks_that_an_earlier_driver_has_left_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: Platform
) -> None:
    run = runs_in(tmp_path, monkeypatch)()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as rank:
        left = RankFile(
            rank=0, host=os.uname().nodename, pid=rank.pid, started_at=0.0, start_ticks=start_ticks(rank.pid)
        )
        write_json(run.rank(0), left)
        result = launch(run, replace(platform, launch=ONE_RANK), no_spark, starting_ranks.finishing_rank)
        ended = rank.poll() is not None
        rank.kill()
    assert result.step == 1
    assert ended


def test_a_driver_names_a_rank_that_the_kernel_does_not_end_and_waits_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pids: list[int] = []
    monkeypatch.setenv("PYTHONPATH", TEST_PATH)
    # SIGKILL has no effect on a process that waits for a dead disk or device.
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: pids.append(process.pid))
    monkeypatch.setattr(local_ranks, "TERM_SECONDS", 0.1)
    monkeypatch.setattr(local_ranks, "KILL_SECONDS", 0.1)
    error = run_local_ranks(RunFolder(tmp_path / "run"), 2, starting_ranks.stuck_rank)
    assert "rank 0 ended with exit code 1" in str(error)
    try:
        assert f"process {pids[-1]} of a rank waits for a disk or a device" in caplog.text
    finally:
        os.kill(pids[-1], signal.SIGKILL)

"""Tests of the diagnosis of a failed training run: which rank is at fault, and whether the run is restarted."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import tiny_run, write_run, write_shards

from pipelines.driver.train import failure as train_failure
from pipelines.driver.train.failure import diagnose_failure, wait_for_failure_records
from pipelines.driver.train.run import reason_not_to_restart
from pipelines.formats.run_folder import Failure, RankFile, RunFolder, write_heartbeat, write_json

FAIL_LATE = """
import socket, sys, time
from pathlib import Path

socket.gethostname = lambda: "elsewhere"
from pipelines.formats.run_folder import RunFolder
from pipelines.worker.rank.failure import RankMonitor

time.sleep(1)
with RankMonitor(RunFolder(Path(sys.argv[1])), 1):
    raise ValueError('late record')
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def write_started_rank(
    run: RunFolder, rank: int, *, host: str | None = None, ended: bool = False, step: int = 5
) -> None:
    content = RankFile(rank=rank, host=host or socket.gethostname(), pid=1, started_at=100.0 + rank, ended=ended)
    write_json(run.rank(rank), content)
    write_heartbeat(run, rank, step)


def write_failed_rank(
    run: RunFolder,
    rank: int,
    at: float,
    *,
    consequence: bool,
    exception: str = "E",
    message: str = "m",
    waiting: bool = False,
) -> None:
    write_started_rank(run, rank)
    record = Failure(
        rank=rank,
        host="other",
        pid=1,
        exception=exception,
        message=message,
        traceback="the traceback",
        step=5,
        failed_at=at,
        consequence=consequence,
        waiting=waiting,
    )
    write_json(run.failure(rank), record)


def test_the_root_cause_is_the_earliest_failure_record_that_is_not_a_consequence_of_another_failure(
    run: RunFolder,
) -> None:
    write_failed_rank(run, 0, 1.0, consequence=True)
    write_failed_rank(run, 1, 3.0, consequence=False, exception="KeyError", message="late")
    write_failed_rank(run, 2, 2.0, consequence=False, exception="ValueError", message="poison")
    run.checkpoint(4).mkdir(parents=True)
    error = diagnose_failure(run, 3, None)
    assert error.what == "rank 2 failed at step 5"
    assert "host other" in error.where
    assert "rank-2.log" in error.where
    assert error.got == "ValueError: poison"
    assert "step_000004" in error.fix
    assert "the traceback" in error.__notes__[0]


def test_the_rank_without_a_record_is_blamed_if_every_failure_record_is_a_consequence_of_another_failure(
    run: RunFolder,
) -> None:
    write_failed_rank(run, 0, 1.0, consequence=True)
    write_started_rank(run, 1, step=9)
    write_started_rank(run, 2, ended=True)
    error = diagnose_failure(run, 3, None)
    assert error.what == "rank 1 ended without a failure record at step 9"
    assert "there is no checkpoint yet" in error.fix


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "none"])
def test_the_shards_are_verified_after_a_rank_has_crashed_and_a_damaged_file_is_named_in_the_error(
    run: RunFolder, tmp_path: Path, damage: str
) -> None:
    shards = write_shards(tmp_path / "shards", rows=10)
    write_run(run.path, tiny_run(), shards, shards)
    write_started_rank(run, 1, step=2)
    run.checkpoint(4).mkdir(parents=True)
    run.log(1).parent.mkdir(parents=True, exist_ok=True)
    run.log(1).write_text("Fatal Python error: Segmentation fault\n")
    file = max(shards.folder.glob("*.arrow"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage != "none":
        file.write_bytes(content[:-1] if damage == "truncated" else content)
    error = diagnose_failure(run, 2, None)
    assert error.what == "rank 1 ended without a failure record at step 4"
    assert ("a training shard is damaged" in error.got) == (str(file) in error.got) == (damage != "none")
    assert error.got.startswith("Fatal Python error: Segmentation fault")


def test_the_rank_with_the_earlier_last_heartbeat_is_blamed_if_two_ranks_left_no_failure_record(run: RunFolder) -> None:
    write_started_rank(run, 1)
    time.sleep(0.01)
    write_started_rank(run, 0)
    assert diagnose_failure(run, 2, None).what.startswith("rank 1 ended without a failure record")


def test_a_rank_that_all_other_ranks_waited_for_is_reported_as_hung(run: RunFolder) -> None:
    write_failed_rank(run, 0, 1.0, consequence=True, exception="Waited", message="waited 60 s for other ranks")
    write_failed_rank(run, 1, 2.0, consequence=True, exception="SIGTERM", waiting=True)
    write_failed_rank(run, 2, 3.0, consequence=True, exception="SIGTERM")
    error = diagnose_failure(run, 3, None)
    assert error.what == "rank 2 hung at step 5"
    assert "rank 0 waited 60 s" in error.got
    assert str(run.failures) in error.fix
    assert [note.splitlines()[0] for note in error.__notes__] == [
        "Rank 0 on other, Waited:",
        "Rank 1 on other, SIGTERM:",
        "Rank 2 on other, SIGTERM:",
    ]


def test_a_rank_that_others_waited_for_and_that_left_no_failure_record_is_reported_as_not_responding(
    run: RunFolder,
) -> None:
    write_failed_rank(run, 0, 1.0, consequence=True, exception="Waited", message="waited 60 s for other ranks")
    write_started_rank(run, 1)
    error = diagnose_failure(run, 2, None)
    assert error.what == "rank 1 has not responded since step 5"
    assert "the silent rank was stopped" in error.got


def test_the_network_is_blamed_if_every_rank_waited_for_another_rank(run: RunFolder) -> None:
    write_failed_rank(run, 0, 1.0, consequence=True, exception="Waited", message="waited 60 s for other ranks")
    write_failed_rank(run, 1, 2.0, consequence=True, exception="SIGTERM", waiting=True)
    error = diagnose_failure(run, 2, None)
    assert error.what == "the ranks lost their connections to each other at step 5"
    assert error.where == "hosts other"
    assert error.got == "rank 0 waited 60 s for other ranks, and all other ranks waited too"
    assert len(error.__notes__) == 2

    error = diagnose_failure(run, 3, None)
    assert error.what == "2 of 3 ranks started, and no rank wrote a result"
    assert error.got == "rank 0 waited 60 s for other ranks"


def test_the_cause_is_read_from_the_log_of_the_rank_or_of_the_launcher_if_a_rank_has_no_failure_record(
    run: RunFolder,
) -> None:
    write_started_rank(run, 1)
    run.launcher_log.parent.mkdir(parents=True)
    run.launcher_log.write_text("rank 0: fine\nrank 1: rank 1 ended at step 7: OSError: No space left on device\nx\n")
    assert diagnose_failure(run, 2, None).got == "rank 1 ended at step 7: OSError: No space left on device"
    run.log(1).write_text("Fatal Python error: Aborted\n\nThread 0x1:\n")
    assert diagnose_failure(run, 2, None).got == "Fatal Python error: Aborted"


def test_a_lost_executor_is_reported_with_its_rank(run: RunFolder) -> None:
    write_failed_rank(run, 0, 1.0, consequence=True)
    write_failed_rank(run, 1, 2.0, consequence=True, exception="LauncherGone")
    spark = RuntimeError("Job aborted: ExecutorLostFailure (executor 1 exited) Reason: code 137\nDriver stacktrace:")
    error = diagnose_failure(run, 2, spark)
    assert error.what == "the executor of rank 1 was lost at step 5"
    assert error.got == "ExecutorLostFailure (executor 1 exited) Reason: code 137"


@pytest.mark.parametrize(
    ("now", "before", "restarts", "reason"),
    [
        (None, None, 0, ""),
        (None, None, 2, "train.max_restarts is 2"),
        ({"exception": "ValueError"}, None, 0, ""),
        ({"exception": "ValueError"}, {"exception": "ValueError"}, 1, "ValueError at step 5 occurred twice"),
        ({"exception": "ValueError"}, {"exception": "OSError"}, 1, ""),
        ({"exception": "ValueError"}, {"exception": "ValueError", "step": 4}, 1, ""),
        ({"exception": "UserError", "lasting": True}, None, 0, "until its cause is fixed"),
    ],
)
def test_a_failed_run_is_restarted_only_after_a_transient_failure(
    now: Any, before: Any, restarts: int, reason: str
) -> None:
    base = {"rank": 0, "host": "h", "pid": 1, "message": "", "traceback": "", "failed_at": 1.0, "consequence": False}
    root, previous = (Failure.model_validate({**base, "step": 5, **more}) if more else None for more in (now, before))
    found = reason_not_to_restart(root, previous, restarts, 2)
    assert reason in found
    assert bool(found) == bool(reason)


def test_ranks_that_never_started_are_reported_with_the_error_of_the_launcher(run: RunFolder) -> None:
    error = diagnose_failure(run, 2, RuntimeError("first line\nNo module named 'pipelines'"))
    assert error.what == "0 of 2 ranks started, and no rank wrote a result"
    assert "No module named" in error.got


def test_the_driver_waits_for_late_failure_records_only_from_ranks_on_other_hosts(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_failure, "RECORD_SECONDS", 300)  # a busy machine needs seconds to start a process
    write_started_rank(run, 0)
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda _: pytest.fail("the driver waits for a rank of its own host"))
        wait_for_failure_records(run)

    write_started_rank(run, 1, host="elsewhere")
    process = subprocess.Popen([sys.executable, "-c", FAIL_LATE, str(run.path)], stderr=subprocess.DEVNULL)
    wait_for_failure_records(run)
    assert diagnose_failure(run, 2, None).got == "ValueError: late record"
    process.wait()

"""How a rank ends: what it leaves on record, in real processes, and whom the driver blames for it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from processes import SUPPORT, is_running
from tiny_runs import tiny_run, write_run, write_shards

from pipelines.driver.train.failure import failure_of, wait_for_words
from pipelines.driver.train.run import why_not_again
from pipelines.formats.run_folder import Failure, RankFile, RunDir, read_json, touch_heartbeat, write_json
from pipelines.worker.rank.failure import is_consequence

START = """
import os, sys, time
from pathlib import Path
from typing import Any
from pipelines.formats.run_folder import RunDir
from pipelines.worker.rank.failure import Watch

run = RunDir(Path(sys.argv[1]))
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def start(run: RunDir, body: str) -> subprocess.Popen[bytes]:
    """A process that does `body` under the watch of rank 0."""
    script = START + "with Watch(run, 0) as watch:\n" + textwrap.indent(textwrap.dedent(body), "    ")
    return subprocess.Popen([sys.executable, "-c", script, str(run.path)], stderr=subprocess.DEVNULL)


def record(run: RunDir) -> Failure:
    return read_json(run.failure(0), Failure)


def wait_until_started(run: RunDir, process: subprocess.Popen[bytes]) -> None:
    while not run.heartbeat(0).exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)  # into the body


def test_a_rank_that_did_all_it_had_to_do_says_so(run: RunDir) -> None:
    assert start(run, "watch.at(7)").wait() == 0
    (rank,) = run.read_ranks()
    assert rank.ended
    assert rank.host == socket.gethostname()
    beat = run.read_heartbeat(0)
    assert beat is not None
    assert beat.step == 7
    assert run.read_failures() == []


def test_an_error_is_on_record_with_step_and_traceback(run: RunDir) -> None:
    assert start(run, "watch.at(7)\nraise ValueError('bad row \\u00e9')").wait() == 1
    failure = record(run)
    assert (failure.exception, failure.message, failure.step) == ("ValueError", "bad row \u00e9", 7)
    assert "Traceback" in failure.traceback
    assert not failure.consequence


def test_a_rank_that_starts_again_takes_its_old_words_away(run: RunDir) -> None:
    assert start(run, "raise ValueError").wait() == 1
    assert set(run.failures.iterdir()) == {run.failure(0), run.stacks(0)}
    assert start(run, "watch.at(7)").wait() == 0
    assert not list(run.failures.iterdir())


@pytest.mark.parametrize("code", [0, 3])
def test_leaving_by_sys_exit_is_on_record(run: RunDir, code: int) -> None:
    assert start(run, f"watch.at(7)\nsys.exit({code})").wait() == code
    assert record(run).exception == "SystemExit"
    assert record(run).message == f"left at step 7 with exit code {code}"
    assert not record(run).consequence


def test_leaving_by_os_exit_leaves_a_rank_that_has_not_ended(run: RunDir) -> None:
    assert start(run, "os._exit(0)").wait() == 0
    assert run.read_failures() == []
    assert not run.read_ranks()[0].ended


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_on_record_although_the_main_thread_never_comes_back(run: RunDir, number: signal.Signals) -> None:
    # sleep() in C, again and again, holding the GIL only in between: the main thread is as deaf as in a collective.
    process = start(run, "import ctypes\nsleep = ctypes.CDLL(None).sleep\nlist(map(sleep, [600] * 9))")
    wait_until_started(run, process)
    process.send_signal(number)
    assert process.wait(timeout=10) == 128 + number
    assert record(run).exception == number.name
    assert record(run).consequence


def test_a_rank_does_not_outlive_its_launcher(run: RunDir, tmp_path: Path) -> None:
    script = START + "with Watch(run, 0):\n    time.sleep(600)"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {script!r}, {str(run.path)!r}])"
    process = subprocess.Popen([sys.executable, "-c", launcher])
    wait_until_started(run, process)
    process.kill()
    process.wait()
    pid = run.read_ranks()[0].pid
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(pid)
    assert record(run).exception == "LauncherGone"


def test_a_rank_that_does_nothing_for_too_long_ends_and_leaves_its_stacks(run: RunDir) -> None:
    assert start(run, "watch.at(7)\nwatch.allow(1)\ntime.sleep(600)").wait(timeout=20) == 1
    assert (record(run).exception, record(run).step, record(run).consequence) == ("Hung", 7, False)
    stacks = run.stacks(0).read_text()
    assert "(most recent call first)" in stacks
    assert stacks.count('File "<string>"') == 1
    assert "_run_out" in stacks


def test_a_rank_whose_interpreter_is_stuck_is_ended_in_the_time_it_was_given_last(run: RunDir) -> None:
    body = f"""
    sys.path.insert(0, {str(SUPPORT)!r})
    from rank_faults import hold_the_interpreter
    watch.allow(0.5)
    hold_the_interpreter()
    """
    assert start(run, body).wait(timeout=60) == 1
    assert not run.failure(0).exists(), "nothing of Python ran any more"


def test_a_thread_that_does_not_stop_keeps_a_failed_rank_a_few_seconds_at_most(run: RunDir) -> None:
    process = start(run, "import threading\nthreading.Thread(target=time.sleep, args=(600,)).start()\nraise ValueError")
    wait_until_started(run, process)
    assert process.wait(timeout=20) == 1
    assert record(run).exception == "ValueError"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (KeyboardInterrupt(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ConnectionResetError("Connection reset by peer"), False),  # a file system's, not a collective's
        (ValueError("timed out waiting"), False),
    ],
)
def test_only_a_broken_collective_or_an_interrupt_is_a_consequence(error: BaseException, expected: bool) -> None:
    assert is_consequence(error) is expected


def test_torchs_own_distributed_errors_are_consequences() -> None:
    from torch.distributed import DistBackendError, DistNetworkError

    assert is_consequence(DistBackendError("NCCL communicator was aborted"))
    assert is_consequence(DistNetworkError("The client socket has timed out"))


# ------------------------------------------------------------------------------------------ the driver's verdict


def started(run: RunDir, rank: int, *, host: str | None = None, ended: bool = False, step: int = 5) -> None:
    who = RankFile(rank=rank, host=host or socket.gethostname(), pid=1, started_at=100.0 + rank, ended=ended)
    write_json(run.rank(rank), who)
    touch_heartbeat(run, rank, step)


def failed(
    run: RunDir,
    rank: int,
    at: float,
    *,
    consequence: bool,
    exception: str = "E",
    message: str = "m",
    waiting: bool = False,
) -> None:
    started(run, rank)
    record = Failure(
        rank=rank,
        host="far",
        pid=1,
        exception=exception,
        message=message,
        traceback="the stack",
        step=5,
        failed_at=at,
        consequence=consequence,
        waiting=waiting,
    )
    write_json(run.failure(rank), record)


def test_the_earliest_cause_is_blamed_not_the_noise_before_it(run: RunDir) -> None:
    failed(run, 0, 1.0, consequence=True)
    failed(run, 1, 3.0, consequence=False, exception="KeyError", message="late")
    failed(run, 2, 2.0, consequence=False, exception="ValueError", message="poison")
    run.checkpoint(4).mkdir(parents=True)
    error = failure_of(run, 3, None)
    assert error.what == "rank 2 failed at step 5"
    assert "host far" in error.where
    assert "rank-2.log" in error.where
    assert error.got == "ValueError: poison"
    assert "step_000004" in error.fix
    assert "the stack" in error.__notes__[0]


def test_without_a_cause_the_silent_rank_is_blamed(run: RunDir) -> None:
    failed(run, 0, 1.0, consequence=True)
    started(run, 1, step=9)
    started(run, 2, ended=True)
    error = failure_of(run, 3, None)
    assert error.what == "rank 1 ended without a word at step 9"
    assert "there is no checkpoint yet" in error.fix


@pytest.mark.parametrize("damage", ["cut", "written over", "none"])
def test_where_a_rank_crashes_its_shards_are_looked_at_and_a_damaged_file_is_named(
    run: RunDir, tmp_path: Path, damage: str
) -> None:
    shards = write_shards(tmp_path / "shards", rows=10)
    write_run(run.path, tiny_run(), shards, shards)
    started(run, 1, step=2)
    run.checkpoint(4).mkdir(parents=True)
    run.log(1).parent.mkdir(parents=True, exist_ok=True)
    run.log(1).write_text("Fatal Python error: Segmentation fault\n")
    file = max(shards.folder.glob("*.arrow"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage != "none":
        file.write_bytes(content[:-1] if damage == "cut" else content)
    error = failure_of(run, 2, None)
    assert error.what == "rank 1 ended without a word at step 4"
    assert ("a training shard is damaged" in error.got) == (str(file) in error.got) == (damage != "none")
    assert error.got.startswith("Fatal Python error: Segmentation fault")


def test_of_two_silent_ranks_the_one_that_fell_silent_first_is_blamed(run: RunDir) -> None:
    started(run, 1)
    time.sleep(0.01)
    started(run, 0)
    assert failure_of(run, 2, None).what.startswith("rank 1 ended without a word")


def test_a_rank_that_others_waited_for_in_vain_is_blamed_for_hanging(run: RunDir) -> None:
    failed(run, 0, 1.0, consequence=True, exception="Waited", message="waited 60 s for other ranks")
    failed(run, 1, 2.0, consequence=True, exception="SIGTERM", waiting=True)
    failed(run, 2, 3.0, consequence=True, exception="SIGTERM")
    error = failure_of(run, 3, None)
    assert error.what == "rank 2 hung at step 5"
    assert "rank 0 waited 60 s" in error.got
    assert str(run.failures) in error.fix
    assert [note.splitlines()[0] for note in error.__notes__] == [
        "Rank 0 on far, Waited:",
        "Rank 1 on far, SIGTERM:",
        "Rank 2 on far, SIGTERM:",
    ]


def test_a_rank_that_could_not_be_asked_is_missed(run: RunDir) -> None:
    failed(run, 0, 1.0, consequence=True, exception="Waited", message="waited 60 s for other ranks")
    started(run, 1)
    error = failure_of(run, 2, None)
    assert error.what == "rank 1 is missing since step 5"
    assert "no word of its own: it was stopped" in error.got


def test_where_all_ranks_waited_for_each_other_none_is_blamed(run: RunDir) -> None:
    failed(run, 0, 1.0, consequence=True, exception="Waited", message="waited 60 s for other ranks")
    failed(run, 1, 2.0, consequence=True, exception="SIGTERM", waiting=True)
    error = failure_of(run, 2, None)
    assert error.what == "the ranks lost each other at step 5"
    assert error.where == "hosts far"
    assert error.got == "rank 0 waited 60 s for other ranks, and all others waited too"
    assert len(error.__notes__) == 2

    error = failure_of(run, 3, None)
    assert error.what == "2 of 3 ranks started, and there is no result"
    assert error.got == "rank 0 waited 60 s for other ranks"


def test_the_last_words_of_a_rank_that_left_no_record_are_in_its_log_or_the_launchers(run: RunDir) -> None:
    started(run, 1)
    run.launcher_log.parent.mkdir(parents=True)
    run.launcher_log.write_text("rank 0: fine\nrank 1: rank 1 ended at step 7: OSError: No space left on device\nx\n")
    assert failure_of(run, 2, None).got == "rank 1 ended at step 7: OSError: No space left on device"
    run.log(1).write_text("Fatal Python error: Aborted\n\nThread 0x1:\n")
    assert failure_of(run, 2, None).got == "Fatal Python error: Aborted"


def test_the_executor_that_spark_has_lost_is_named_by_its_rank(run: RunDir) -> None:
    failed(run, 0, 1.0, consequence=True)
    failed(run, 1, 2.0, consequence=True, exception="LauncherGone")
    spark = RuntimeError("Job aborted: ExecutorLostFailure (executor 1 exited) Reason: code 137\nDriver stacktrace:")
    error = failure_of(run, 2, spark)
    assert error.what == "the executor of rank 1 was lost at step 5"
    assert error.got == "ExecutorLostFailure (executor 1 exited) Reason: code 137"


@pytest.mark.parametrize(
    ("now", "before", "restarts", "reason"),
    [
        (None, None, 0, ""),
        (None, None, 2, "train.max_restarts is 2"),
        ({"exception": "ValueError"}, None, 0, ""),
        ({"exception": "ValueError"}, {"exception": "ValueError"}, 1, "ValueError at step 5 came twice"),
        ({"exception": "ValueError"}, {"exception": "OSError"}, 1, ""),
        ({"exception": "ValueError"}, {"exception": "ValueError", "step": 4}, 1, ""),
        ({"exception": "UserError", "lasting": True}, None, 0, "until its cause is removed"),
    ],
)
def test_a_failed_run_starts_again_where_that_may_help(now: Any, before: Any, restarts: int, reason: str) -> None:
    base = {"rank": 0, "host": "h", "pid": 1, "message": "", "traceback": "", "failed_at": 1.0, "consequence": False}
    root, root_before = (
        Failure.model_validate({**base, "step": 5, **more}) if more else None for more in (now, before)
    )
    said = why_not_again(root, root_before, restarts, 2)
    assert reason in said
    assert bool(said) == bool(reason)


def test_ranks_that_never_started_are_told_by_the_launchers_words(run: RunDir) -> None:
    error = failure_of(run, 2, RuntimeError("first line\nNo module named 'pipelines'"))
    assert error.what == "0 of 2 ranks started, and there is no result"
    assert "No module named" in error.got


def test_the_driver_waits_for_the_word_of_a_rank_elsewhere_but_not_for_a_dead_one_here(run: RunDir) -> None:
    started(run, 0)
    before = time.monotonic()
    wait_for_words(run)
    assert time.monotonic() - before < 1

    started(run, 1, host="elsewhere")
    script = START + "time.sleep(1)\nwith Watch(run, 1):\n    raise ValueError('late word')"
    process = subprocess.Popen([sys.executable, "-c", script, str(run.path)], stderr=subprocess.DEVNULL)
    wait_for_words(run)
    assert failure_of(run, 2, None).got == "ValueError: late word"
    process.wait()

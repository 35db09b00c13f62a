"""Tests, in real processes, of the monitor of a rank, which records every way in which the rank ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from processes import SUPPORT, is_running

from pipelines.formats.run_folder import Failure, RunFolder, read_json
from pipelines.worker.rank.failure import is_consequence

START = """
import os, sys, time
from pathlib import Path
from typing import Any
from pipelines.formats.run_folder import RunFolder
from pipelines.worker.rank.failure import RankMonitor

run = RunFolder(Path(sys.argv[1]))
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def start_rank(run: RunFolder, body: str, before: str = "") -> subprocess.Popen[bytes]:
    """Start a process that runs the code `before`, and then the code `body` inside the monitor of rank 0."""
    script = START + before + "with RankMonitor(run, 0) as monitor:\n" + textwrap.indent(textwrap.dedent(body), "    ")
    return subprocess.Popen([sys.executable, "-c", script, str(run.path)], stderr=subprocess.DEVNULL)


def failure_record(run: RunFolder) -> Failure:
    return read_json(run.failure(0), Failure)


def wait_until_started(run: RunFolder, process: subprocess.Popen[bytes]) -> None:
    while not run.heartbeat(0).exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)  # the process enters `body` during this wait


def test_a_rank_that_finishes_writes_its_end_mark(run: RunFolder) -> None:
    assert start_rank(run, "monitor.report_step(7)").wait() == 0
    (rank,) = run.read_ranks()
    assert rank.ended
    assert rank.host == socket.gethostname()
    beat = run.read_heartbeat(0)
    assert beat is not None
    assert beat.step == 7
    assert run.read_failures() == []


def test_heartbeats_are_written_in_the_background_and_a_failed_write_fails_the_rank_at_its_next_step(
    run: RunFolder,
) -> None:
    body = """
    monitor.report_step(3)
    while run.read_heartbeat(0).step != 3:
        time.sleep(0.01)
    shutil.rmtree(run.heartbeat(0).parent)
    run.heartbeat(0).parent.touch()
    while True:
        monitor.report_step(4)
    """
    process = start_rank(
        run, body, "import shutil\nfrom pipelines.worker.rank import failure\nfailure.HEARTBEAT_SECONDS = 0.1\n"
    )
    assert process.wait(timeout=60) == 1
    failure = failure_record(run)
    assert (failure.exception, failure.step) == ("FileExistsError", 4)
    assert not failure.consequence


def test_an_error_of_a_rank_is_recorded_with_its_step_and_traceback(run: RunFolder) -> None:
    assert start_rank(run, "monitor.report_step(7)\nraise ValueError('bad row \\u00e9')").wait() == 1
    failure = failure_record(run)
    assert (failure.exception, failure.message, failure.step) == ("ValueError", "bad row \u00e9", 7)
    assert "Traceback" in failure.traceback
    assert not failure.consequence


def test_a_restarted_rank_removes_the_failure_record_of_its_earlier_attempt(run: RunFolder) -> None:
    assert start_rank(run, "raise ValueError").wait() == 1
    assert set(run.failures.iterdir()) == {run.failure(0), run.stacks(0)}
    assert start_rank(run, "monitor.report_step(7)").wait() == 0
    assert not list(run.failures.iterdir())


@pytest.mark.parametrize("code", [0, 3])
def test_a_rank_that_calls_sys_exit_is_recorded_as_failed(run: RunFolder, code: int) -> None:
    assert start_rank(run, f"monitor.report_step(7)\nsys.exit({code})").wait() == code
    assert failure_record(run).exception == "SystemExit"
    assert failure_record(run).message == f"exited at step 7 with exit code {code}"
    assert not failure_record(run).consequence


def test_a_rank_that_calls_os_exit_writes_neither_a_failure_record_nor_its_end_mark(run: RunFolder) -> None:
    assert start_rank(run, "os._exit(0)").wait() == 0
    assert run.read_failures() == []
    assert not run.read_ranks()[0].ended


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_recorded_even_while_the_main_thread_is_blocked_in_c_code(
    run: RunFolder, number: signal.Signals
) -> None:
    # The main thread is blocked in C code (`sleep`), as in a collective operation, so it runs no Python signal handler.
    process = start_rank(run, "import ctypes\nsleep = ctypes.CDLL(None).sleep\nlist(map(sleep, [600] * 9))")
    wait_until_started(run, process)
    process.send_signal(number)
    assert process.wait(timeout=10) == 128 + number
    assert failure_record(run).exception == number.name
    assert failure_record(run).consequence


def test_a_rank_does_not_outlive_its_launcher(run: RunFolder, tmp_path: Path) -> None:
    script = START + "with RankMonitor(run, 0):\n    time.sleep(600)"
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
    assert failure_record(run).exception == "LauncherGone"


def test_a_rank_without_progress_times_out_and_writes_its_stacks(run: RunFolder) -> None:
    assert start_rank(run, "monitor.report_step(7)\nmonitor.set_timeout(1)\ntime.sleep(600)").wait(timeout=20) == 1
    failure = failure_record(run)
    assert (failure.exception, failure.step, failure.consequence) == ("Hung", 7, False)
    stacks = run.stacks(0).read_text()
    assert "(most recent call first)" in stacks
    assert stacks.count('File "<string>"') == 1
    assert "_handle_timeout" in stacks


def test_a_rank_whose_python_interpreter_is_stuck_is_ended_after_its_timeout(run: RunFolder) -> None:
    body = f"""
    sys.path.insert(0, {str(SUPPORT)!r})
    from rank_faults import hold_the_interpreter
    monitor.set_timeout(0.5)
    hold_the_interpreter()
    """
    assert start_rank(run, body).wait(timeout=60) == 1
    assert not run.failure(0).exists(), "no Python code could run"


def test_a_thread_that_does_not_stop_delays_the_end_of_a_failed_rank_by_only_a_few_seconds(run: RunFolder) -> None:
    body = "import threading\nthreading.Thread(target=time.sleep, args=(600,)).start()\nraise ValueError"
    process = start_rank(run, body)
    wait_until_started(run, process)
    assert process.wait(timeout=20) == 1
    assert failure_record(run).exception == "ValueError"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (KeyboardInterrupt(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ConnectionResetError("Connection reset by peer"), False),  # this error may come from a file system
        (ValueError("timed out waiting"), False),
    ],
)
def test_only_a_broken_collective_operation_or_an_interrupt_is_recorded_as_a_consequence_of_another_failure(
    error: BaseException, expected: bool
) -> None:
    assert is_consequence(error) is expected


def test_errors_of_torch_distributed_are_recorded_as_consequences_of_another_failure() -> None:
    from torch.distributed import DistBackendError, DistNetworkError

    assert is_consequence(DistBackendError("NCCL communicator was aborted"))
    assert is_consequence(DistNetworkError("The client socket has timed out"))

"""Helpers that kill Spark's Python workers, executors and drivers at random moments by SIGKILL (Linux only)."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Literal, TypeVar

from processes import TEST_PATH

from pipelines.background_thread import in_background
from pipelines.errors import StageFailed

T = TypeVar("T")
ProcessKind = Literal["worker", "executor"]
KILLS = 4
"""Largest number of processes that are killed during one job."""
COMMANDS = {"worker": "pyspark.daemon", "executor": "CoarseGrainedExecutorBackend"}


def retry(job: Callable[[], T]) -> T:
    """Run a job until the job succeeds, at most four times, as a job scheduler does."""
    for _ in range(3):
        try:
            return job()
        except StageFailed:
            continue
    return job()


def spark_processes(kind: ProcessKind) -> list[int]:
    """List the process ids of all processes of the given kind that descend from this process."""
    parents, found = {}, []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # the process has ended in the meantime
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    for pid in parents:
        ancestor, commands = pid, []
        while ancestor in parents and ancestor != os.getpid():
            commands.append(_command(ancestor))
            ancestor = parents[ancestor]
        # Python workers are forked from Spark's daemon and keep the daemon's command line. A process is therefore a
        # worker if the process and its parent both have this command line.
        depth = 2 if kind == "worker" else 1
        if ancestor == os.getpid() and [COMMANDS[kind] in line for line in commands[:depth]] == [True] * depth:
            found.append(pid)
    return found


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


@contextmanager
def kill_some(kind: ProcessKind, moments: Sequence[float], rng: random.Random) -> Iterator[list[int]]:
    """Kill processes of the given kind while the block runs.

    Args:
        kind: which kind of process to kill: a Python `worker` or an `executor`.
        moments: seconds from the start of the block to each kill. If no process of the given kind runs at one of these
            moments, the kill comes later.
        rng: random generator that chooses the processes to kill.

    Yields:
        A list that is empty before the first kill, and that contains the ids of the killed processes.
    """
    killed, started = list[int](), time.monotonic()

    def kill(ended: threading.Event) -> None:
        for number, moment in enumerate(sorted(moments), start=1):
            ended.wait(max(0.0, started + moment - time.monotonic()))
            while not ended.is_set() and len(killed) < number:
                for pid in rng.sample(found := spark_processes(kind), min(1, len(found))):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        killed.append(pid)
                ended.wait(0.05)

    with in_background(kill, "killer"):
        yield killed


class KillWindow:
    """Longest planned time from the start of a job to a kill, in seconds. `run_with_kills` may change this time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


def run_with_kills(kind: ProcessKind, rng: random.Random, window: KillWindow, job: Callable[[str], T]) -> T:
    """Run a job, kill up to KILLS processes at random moments during the job, and return the job's result.

    Args:
        kind: which kind of process to kill: a Python `worker` or an `executor`.
        rng: random generator that chooses the moments of the kills and the processes to kill.
        window: time window of the kills. If a job ends before the first kill, the window becomes 1.2 times the job's
            duration, and a new job is run. After eight such jobs, AssertionError is raised.
        job: function to run, called with a name that is different for each attempt.
    """
    for attempt in range(8):
        started = time.monotonic()
        with kill_some(kind, [rng.uniform(0, window.seconds) for _ in range(KILLS)], rng) as killed:
            result = job(f"attempt-{attempt}")
        if killed:
            print(f"{len(killed)} processes killed")
            return result
        window.seconds = 1.2 * (time.monotonic() - started)
    raise AssertionError("in all eight attempts, the job ended before a process was killed")


def start_script(script: ModuleType, home: Path, folder: Path) -> subprocess.Popen[bytes]:
    """Start a module of tests/support as a script. The script creates HOME/started when its Spark session is open."""
    environment = os.environ | {"LAKESIGHT_HOME": str(home), "PYTHONPATH": TEST_PATH}
    command = [sys.executable, str(script.__file__), str(folder)]
    with (home / "log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, process_group=0)


def kill_after(process: subprocess.Popen[bytes], home: Path, seconds: float) -> None:
    """Kill a script and all its child processes some seconds after the script opened its Spark session."""
    while not (home / "started").exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (home / "started").unlink(missing_ok=True)

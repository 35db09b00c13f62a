"""Ingest and shards under kill -9: a process that does both, what can be killed of it, and what must be there after.

LAKESIGHT_HOME=HOME python killed.py FOLDER
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Literal, TypeVar

from helpers import TEST_PATH, tiny_model
from pictures import as_base64, png, write_csv
from pyspark.sql import SparkSession

from pipelines.background import beside
from pipelines.config import DataConfig, LocalPlatformConfig
from pipelines.driver.ingest.run import ingest
from pipelines.driver.shard import shard
from pipelines.platform import Platform, local

T = TypeVar("T")
Victim = Literal["worker", "executor"]
NAMES = {"worker": "pyspark.daemon", "executor": "CoarseGrainedExecutorBackend"}
SOURCE = "killed"


def write_rows(folder: Path, first: int, count: int) -> dict[str, str]:
    """A file of good rows, each with a text of its own, every tenth followed by a bad one; texts by picture."""
    rows = []
    for n in range(first, first + count):
        rows += [[as_base64(png(n)), f"picture {n}"]] + ([[f"?{n}", "bad"]] if n % 10 == 0 else [])
    write_csv(folder / f"from-{first}.csv", rows)
    return {f"picture {n}": png(n).hex() for n in range(first, first + count)}


def work(spark: SparkSession, platform: Platform, source: str, folder: Path) -> None:
    """Ingest what is in the folder and write shards of it."""
    config = DataConfig.model_validate(
        {"source": {"path": str(folder)}, "split": {"kind": "hash", "val": 0, "test": 0}}
    )
    ingest(spark, platform, source, config)
    shard(spark, platform, source, config, tiny_model().image, "train")


def processes_of(victim: Victim) -> list[int]:
    """Processes below this one of a kind (Linux)."""
    parents, ours = {}, []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    for pid in parents:
        above, names = pid, []
        while above in parents and above != os.getpid():
            names.append(_command(above))
            above = parents[above]
        # The daemon forks workers, which carry its name: one of them has two of that name in its line.
        wanted = 2 if victim == "worker" else 1
        if above == os.getpid() and [NAMES[victim] in name for name in names[:wanted]] == [True] * wanted:
            ours.append(pid)
    return ours


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


@contextmanager
def killer(victim: Victim, after: float, rng: random.Random) -> Iterator[list[int]]:
    """Kill one process of a kind some seconds into the block, or at its first chance then; yields whom it killed."""
    struck = list[int]()

    def strike(ended: threading.Event) -> None:
        ended.wait(after)
        while not (ended.is_set() or struck):
            for pid in rng.sample(found := processes_of(victim), min(1, len(found))):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    struck.append(pid)
            ended.wait(0.05)

    with beside(strike, "killer"):
        yield struck


class Pace:
    """How long kills may wait: somewhat longer than a job takes that nobody kills, as the last such one took."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


def struck(victim: Victim, rng: random.Random, pace: Pace, job: Callable[[str], T]) -> T:
    """What a job returns during which a process was killed at a random moment.

    Args:
        victim: kind of the process.
        rng: draws the moment and the process.
        pace: a job that had ended before its kill corrects it, and another one is begun.
        job: is given a name of its own each time.
    """
    for attempt in range(8):
        begun = time.monotonic()
        with killer(victim, rng.uniform(0, pace.seconds), rng) as killed:
            result = job(f"attempt-{attempt}")
        if killed:
            return result
        pace.seconds = 1.2 * (time.monotonic() - begun)
    raise AssertionError("eight jobs had ended before their kill")


def start(script: ModuleType, home: Path, folder: Path) -> subprocess.Popen[bytes]:
    """A process of its own that does a script's work on a folder; it says in `started` that its session has begun."""
    environment = os.environ | {"LAKESIGHT_HOME": str(home), "PYTHONPATH": TEST_PATH}
    command = [sys.executable, str(script.__file__), str(folder)]
    with (home / "log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, process_group=0)


def kill_after(process: subprocess.Popen[bytes], home: Path, seconds: float) -> None:
    """Kill the driver, its JVM and all below them some seconds after its session began."""
    while not (home / "started").exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (home / "started").unlink(missing_ok=True)


if __name__ == "__main__":
    here = local(LocalPlatformConfig())
    session = here.open_spark()
    (here.root / "started").touch()
    work(session, here, SOURCE, Path(sys.argv[1]))
    session.stop()

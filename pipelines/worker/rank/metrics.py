"""Functions for the log of a rank, the throughput of its training steps, and the metric files that rank 0 writes.

All output of a rank is written to its own log file, including output of C++ libraries and crash dumps. The stream to
the launcher receives only log lines, because this stream cuts lines at 4,000 characters and fails at a byte that is not
UTF-8.
"""

from __future__ import annotations

import faulthandler
import io
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from pipelines.formats.run_folder import Metrics, RunFolder, write_json
from vlm.config import Config
from vlm.errors.printable import PrintableFormatter

T = TypeVar("T")

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def open_log(run: RunFolder, rank: int) -> None:
    """Redirect stdout, stderr and logging to logs/rank-N.log.

    The terminal receives rank 0's log records of level INFO and above, and the warnings and errors of all other ranks.
    """
    path = run.log(rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    terminal = io.TextIOWrapper(
        os.fdopen(os.dup(1), "wb", buffering=0), encoding="utf-8", errors="backslashreplace", write_through=True
    )
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(PrintableFormatter(_FORMAT))
    console = logging.StreamHandler(terminal)
    console.setLevel(logging.WARNING if rank else logging.INFO)
    console.setFormatter(PrintableFormatter(f"rank {rank}: %(message)s"))
    logging.getLogger().addHandler(console)


class Stopwatch:
    """Timer that measures the throughput of training steps, without the pauses for validation and checkpoints."""

    def __init__(self) -> None:
        self.total = 0.0
        """Total time of all training steps that this process has taken so far, in seconds."""
        self._seconds, self._samples, self._tokens, self._waited = 0.0, 0, 0, 0.0
        self._resumed = time.perf_counter()

    def time_waits(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the batches unchanged, and measure how long the training loop waits for batches."""
        while True:
            requested = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - requested
            if batch is None:
                return
            yield batch

    def stop(self, samples: int, tokens: int) -> None:
        """Record the end of a step.

        Args:
            samples: number of rows (pictures or windows) in the step, over all ranks together.
            tokens: number of target tokens in the step.
        """
        elapsed = time.perf_counter() - self._resumed
        self.total += elapsed
        self._seconds, self._samples, self._tokens = (
            self._seconds + elapsed,
            self._samples + samples,
            self._tokens + tokens,
        )

    def start(self) -> None:
        """Record the start of a step."""
        self._resumed = time.perf_counter()

    def lap(self) -> dict[str, float]:
        """Return the rates since the last call of this method or, in the first call, since the timer was created.

        Returns:
            samples_per_second, tokens_per_second, and data_wait: the fraction of time spent waiting for batches.
        """
        rates = {
            "samples_per_second": self._samples / self._seconds,
            "tokens_per_second": self._tokens / self._seconds,
            "data_wait": self._waited / self._seconds,
        }
        self._seconds, self._samples, self._tokens, self._waited = 0.0, 0, 0, 0.0
        return rates


class MeanSinceLog:
    """Mean of a value, such as the training loss per target token, since the last logged step or checkpoint.

    Each checkpoint starts a new mean, so that a run that resumes from the checkpoint logs the same values.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Discard all values added so far."""
        self._sum, self._weight = 0.0, 0

    def add(self, mean: float, weight: int) -> None:
        """Add the mean value of a step, weighted for example by the number of target tokens in the step."""
        self._sum, self._weight = self._sum + mean * weight, self._weight + weight

    def take(self) -> float:
        """Return the mean over the steps since the last call of `take` or `restart`, and start a new mean."""
        mean = self._sum / self._weight
        self.restart()
        return mean


class FileWriter:
    """Writer that writes small files of a run in a background thread, one after another, in the order of the calls.

    On a network file system, writing a small file takes tens of milliseconds. The training loop does not wait for the
    write. An error of a write is raised in the training loop, because a run that cannot write its files must fail.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="files")
        self._pending: deque[Future[None]] = deque()
        self.last: Future[None] = Future()
        """Future of the newest write. When the newest write has ended, all earlier writes have ended too."""
        self.last.set_result(None)

    def write(self, path: Path, content: Config) -> None:
        """Schedule the write of a JSON file, and return immediately."""
        self.last = self._thread.submit(write_json, path, content)
        self._pending.append(self.last)

    def check(self) -> None:
        """Raise the error of a file that could not be written. This method does not wait for writes in progress.

        Raises:
            OSError: a file could not be written.
        """
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()

    def wait(self) -> None:
        """Wait until all files are written.

        Raises:
            OSError: a file could not be written.
        """
        while self._pending:
            self._pending.popleft().result()


def write_metrics(
    files: FileWriter, path: Path, step: int, values: dict[str, float], expert_load: dict[str, tuple[float, ...]]
) -> None:
    """Schedule the write of the metrics of one step. The driver forwards the metrics to MLflow."""
    files.write(path, Metrics(step=step, time=time.time(), values=values, expert_load=expert_load))

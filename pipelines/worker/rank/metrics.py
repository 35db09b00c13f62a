"""What a rank says: its log, and (rank 0) the metric files that others follow.

Everything a rank prints goes into its own log file, C++ libraries and crash dumps included, because the launcher's
stream is cut at 4,000 characters a line and breaks at the first byte that is not UTF-8.
The terminal gets log lines only.
"""

from __future__ import annotations

import faulthandler
import io
import logging
import os
import sys
import time
from collections.abc import Iterator

from pipelines.formats.run_folder import Metrics, RunDir, write_json
from vlm.batch import Batch

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def open_log(run: RunDir, rank: int) -> None:
    """Send stdout, stderr and logging into logs/rank-N.log; log lines go to the terminal too, above rank 0 warnings."""
    path = run.log(rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    terminal = io.TextIOWrapper(
        os.fdopen(os.dup(2), "wb", buffering=0), encoding="utf-8", errors="backslashreplace", write_through=True
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
    logging.basicConfig(level=logging.INFO, format=_FORMAT, stream=sys.stderr, force=True)
    people = logging.StreamHandler(terminal)
    people.setLevel(logging.WARNING if rank else logging.INFO)
    people.setFormatter(logging.Formatter(f"rank {rank}: %(message)s"))
    logging.getLogger().addHandler(people)


class Stopwatch:
    """Rates over the training steps since the last lap; pauses (validation, checkpoints) do not count."""

    def __init__(self) -> None:
        self.total = 0.0
        self._seconds, self._samples, self._tokens, self._waited = 0.0, 0, 0, 0.0
        self._resumed = time.perf_counter()

    def waiting(self, batches: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
        """The same batches; how long each lets the training wait is added up."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def stop(self, samples: int, tokens: int) -> None:
        """A step over `samples` pictures and `tokens` target tokens has ended."""
        elapsed = time.perf_counter() - self._resumed
        self.total += elapsed
        self._seconds, self._samples, self._tokens = (
            self._seconds + elapsed,
            self._samples + samples,
            self._tokens + tokens,
        )

    def start(self) -> None:
        """The next step begins."""
        self._resumed = time.perf_counter()

    def lap(self) -> dict[str, float]:
        """Since the last lap: samples_per_second, tokens_per_second, and data_wait, the share of time spent waiting."""
        rates = {
            "samples_per_second": self._samples / self._seconds,
            "tokens_per_second": self._tokens / self._seconds,
            "data_wait": self._waited / self._seconds,
        }
        self._seconds, self._samples, self._tokens, self._waited = 0.0, 0, 0, 0.0
        return rates


def write_metrics(run: RunDir, step: int, values: dict[str, float], expert_load: dict[str, tuple[float, ...]]) -> None:
    """One log step, for whoever follows the run."""
    write_json(run.metrics(step), Metrics(step=step, time=time.time(), values=values, expert_load=expert_load))

"""Helpers that measure the memory of a process tree, generate pictures, and measure functions in turn."""

from __future__ import annotations

import base64
import csv
import io
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.background_thread import in_background


def make(path: Path, count: int, side: int, kind: str = "PNG", height: int | None = None, seed: int = 0) -> None:
    """Write a CSV file of pictures: smooth colour fields with a little noise, similar to photographs of plain
    surfaces.

    The pictures are `side` pixels wide and `height` pixels high; without `height`, the pictures are square.
    """
    options: dict[str, int] = {"compress_level": 1} if kind == "PNG" else {"quality": 90}
    rng = np.random.default_rng(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["b64string_images", "caption"])
        for number in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            field = np.asarray(coarse.resize((side, height or side), Image.Resampling.BICUBIC)) // 2
            buffer = io.BytesIO()
            noisy = (field + rng.integers(0, 8, field.shape)).astype(np.uint8)
            Image.fromarray(noisy).save(buffer, kind, **options)
            writer.writerow([base64.b64encode(buffer.getvalue()).decode(), f"picture {number}"])


def family() -> dict[int, list[str]]:
    """Return a dict from process id to fields 3 and later of /proc/PID/stat, for this process and its descendants
    (Linux).
    """
    stats = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the process has ended meanwhile
            stats[int(stat.parent.name)] = stat.read_text().rpartition(")")[2].split()
    ours = {os.getpid()}
    while more := {pid for pid, fields in stats.items() if int(fields[1]) in ours} - ours:
        ours |= more
    return {pid: stats[pid] for pid in ours if pid in stats}


def resident() -> int:
    """Return the resident bytes of this process and its descendants (Linux)."""
    return sum(int(fields[21]) for fields in family().values()) * os.sysconf("SC_PAGE_SIZE")


def processor_seconds() -> float:
    """Return the CPU seconds of this process and its descendants, including ended descendants (Linux)."""
    ticks = sum(int(field) for fields in family().values() for field in fields[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def sampling(sample: Callable[[], None]) -> AbstractContextManager[None]:
    """Call `sample` five times a second while the block runs."""

    def watch(ended: threading.Event) -> None:
        while not ended.wait(0.2):
            sample()

    return in_background(watch, "sampling")


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Sample `resident` five times a second while the block runs."""
    samples = [resident()]
    with sampling(lambda: samples.append(resident())):
        yield samples


@contextmanager
def peak_by_process() -> Iterator[dict[str, int]]:
    """While the block runs, measure the peak resident memory of the driver, the JVM, and the largest Python worker."""
    peaks = dict.fromkeys(("driver", "JVM", "worker"), 0)

    def sample() -> None:
        for pid, fields in family().items():
            with suppress(OSError):  # the process has ended meanwhile
                name = Path(f"/proc/{pid}/cmdline").read_text()
                kinds = {"driver": pid == os.getpid(), "JVM": "java" in name, "worker": "pyspark.daemon" in name}
                # A new child process of the JVM has no kind until it calls exec.
                kind = next((kind for kind, is_it in kinds.items() if is_it), None)
                if kind:
                    peaks[kind] = max(peaks[kind], int(fields[21]) * os.sysconf("SC_PAGE_SIZE"))

    with sampling(sample):
        yield peaks


def measured(work: Callable[[], int]) -> tuple[float, float]:
    """Return items per second and peak resident memory in MB."""
    with peak_memory() as samples:
        started = time.monotonic()
        count = work()
        seconds = time.monotonic() - started
    return count / seconds, max(samples) / 1e6


def in_turn(
    works: dict[str, Callable[[], int]], rounds: int, clock: Callable[[], float] = time.monotonic
) -> dict[str, float]:
    """Run functions in turn, because a machine's speed drifts. Return each function's median items per second."""
    rates: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            started = clock()
            count = work()
            rates[name].append(count / (clock() - started))
    return {name: statistics.median(found) for name, found in rates.items()}

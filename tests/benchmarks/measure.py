"""What benchmarks share: resident memory of a process tree, made pictures, and A beside B in turn."""

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

from pipelines.background import in_background


def make(path: Path, count: int, side: int, kind: str = "PNG", height: int | None = None, seed: int = 0) -> None:
    """A CSV of pictures: smooth colour fields with a little noise. PNG packs them like photographs' flat parts.

    They are `side` pixels wide, and as high unless `height` says otherwise.
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
    """What /proc says of this process and all below it, from the third field of `stat` on, by its number (Linux)."""
    stats = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            stats[int(stat.parent.name)] = stat.read_text().rpartition(")")[2].split()
    ours = {os.getpid()}
    while more := {pid for pid, fields in stats.items() if int(fields[1]) in ours} - ours:
        ours |= more
    return {pid: stats[pid] for pid in ours if pid in stats}


def resident() -> int:
    """Resident bytes of this process and all below it (Linux)."""
    return sum(int(fields[21]) for fields in family().values()) * os.sysconf("SC_PAGE_SIZE")


def processor_seconds() -> float:
    """Seconds of the processor that this process and all below it, the ended ones too, have had (Linux)."""
    ticks = sum(int(field) for fields in family().values() for field in fields[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def watching(look: Callable[[], None]) -> AbstractContextManager[None]:
    """Call `look` five times a second while the block runs."""

    def watch(ended: threading.Event) -> None:
        while not ended.wait(0.2):
            look()

    return in_background(watch, "watching")


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Samples of `resident` taken five times a second while the block runs."""
    samples = [resident()]
    with watching(lambda: samples.append(resident())):
        yield samples


@contextmanager
def peak_of_each() -> Iterator[dict[str, int]]:
    """Peaks of resident memory while the block runs: of the driver, of its JVM, and of the largest Python worker."""
    peaks = dict.fromkeys(("driver", "JVM", "worker"), 0)

    def look() -> None:
        for pid, fields in family().items():
            with suppress(OSError):  # it ended meanwhile
                name = Path(f"/proc/{pid}/cmdline").read_text()
                kinds = {"driver": pid == os.getpid(), "JVM": "java" in name, "worker": "pyspark.daemon" in name}
                kind = next((kind for kind, is_it in kinds.items() if is_it), None)  # else the JVM's, about to be ls
                if kind:
                    peaks[kind] = max(peaks[kind], int(fields[21]) * os.sysconf("SC_PAGE_SIZE"))

    with watching(look):
        yield peaks


def measured(work: Callable[[], int]) -> tuple[float, float]:
    """Items a second, and the peak of resident memory in MB."""
    with peak_memory() as samples:
        started = time.monotonic()
        count = work()
        seconds = time.monotonic() - started
    return count / seconds, max(samples) / 1e6


def in_turn(
    works: dict[str, Callable[[], int]], rounds: int, clock: Callable[[], float] = time.monotonic
) -> dict[str, float]:
    """Items a second of each, the median of several rounds; A B A B, because a machine's speed drifts."""
    rates: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            started = clock()
            count = work()
            rates[name].append(count / (clock() - started))
    return {name: statistics.median(found) for name, found in rates.items()}

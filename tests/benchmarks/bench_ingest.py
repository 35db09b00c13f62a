"""Ingest beside a bare Pillow loop on the same rows and as many cores: pictures a second, their ratio, peak memory.

    python tests/benchmarks/bench_ingest.py                       pictures made on the spot: 1024 x 1024 PNG
    python tests/benchmarks/bench_ingest.py FILE.csv [ID_COLUMN]  a file of your own

The loop reads the CSV, decodes base64 and decodes the picture to RGB, in one process a core; ingest does all that, and
hashes, checks and writes Delta. Spark is warmed up by a small ingest first. Memory is the resident memory of all
processes together, sampled five times a second from /proc (Linux).
"""

from __future__ import annotations

import base64
import csv
import io
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.config import DataConfig, LocalPlatformConfig
from pipelines.driver.ingest import ingest
from pipelines.platform import local

MADE, SIDE, WARM_UP = 200, 1024, 20


def make(path: Path, count: int, side: int) -> None:
    """Smooth colour fields with a little noise: PNG packs them about as well as photographs' flat parts."""
    rng = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["b64string_images", "caption"])
        for number in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            field = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)) // 2
            buffer = io.BytesIO()
            noisy = (field + rng.integers(0, 8, field.shape)).astype(np.uint8)
            Image.fromarray(noisy).save(buffer, "PNG", compress_level=1)
            writer.writerow([base64.b64encode(buffer.getvalue()).decode(), f"picture {number}"])


def bare(text: str) -> tuple[int, int]:
    """What a loop without a lakehouse does with one row."""
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB").size


def loop(path: Path, cores: int) -> int:
    """The bare loop over a CSV file; the number of pictures."""
    csv.field_size_limit(sys.maxsize)
    with path.open(newline="") as file, multiprocessing.get_context("fork").Pool(cores) as pool:
        texts = (row["b64string_images"] for row in csv.DictReader(file))
        return sum(1 for _ in pool.imap_unordered(bare, texts, chunksize=8))


def resident() -> int:
    """Resident bytes of this process and all below it."""
    parents, pages = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()
            parents[int(stat.parent.name)], pages[int(stat.parent.name)] = int(fields[1]), int(fields[21])
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sum(pages[pid] for pid in ours) * os.sysconf("SC_PAGE_SIZE")


def measured(work: Callable[[], int]) -> tuple[float, float]:
    """Pictures a second, and the peak of resident memory in MB."""
    done, peak = threading.Event(), [resident()]

    def watch() -> None:
        while not done.wait(0.2):
            peak.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    count = work()
    seconds = time.monotonic() - started
    done.set()
    watcher.join()
    return count / seconds, max(peak) / 1e6


def main() -> None:
    """Run both and print the table."""
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LAKESIGHT_HOME"] = folder
        warm, path = Path(folder) / "warm.csv", Path(folder) / "made.csv"
        make(warm, WARM_UP, 64)
        if len(sys.argv) > 1:
            path = Path(sys.argv[1])
        else:
            make(path, MADE, SIDE)
        columns = {"id": sys.argv[2]} if len(sys.argv) > 2 else {}
        loop_rate, loop_peak = measured(lambda: loop(path, cores))

        platform = local(LocalPlatformConfig())
        spark = platform.open_spark()
        ingest(spark, platform, "warm", DataConfig.model_validate({"source": {"path": str(warm)}}))
        config = DataConfig.model_validate({"source": {"path": str(path), "columns": columns}})
        rate, peak = measured(lambda: ingest(spark, platform, "bench", config).rows_in)
        spark.stop()
    print(f"{path.name}, {cores} cores")
    print(f"bare Pillow loop  {loop_rate:8.1f} pictures/s  {loop_peak:6.0f} MB")
    print(f"lakesight ingest  {rate:8.1f} pictures/s  {peak:6.0f} MB  ratio {rate / loop_rate:.2f}")


if __name__ == "__main__":
    main()

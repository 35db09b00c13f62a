"""Speed of ingest compared with a plain Pillow loop on the same rows and cores, for three kinds of pictures.

    python tests/benchmarks/bench_ingest.py

The loop reads the CSV file, decodes the base64 text and decodes the picture to RGB, with one process per core. Ingest
does the same work and more: ingest also hashes and checks the rows, finds the new rows, and writes these rows to Delta.
For each kind of picture, a small file and a file with four times as many pictures are ingested. The difference between
the costs of the two files is the cost of the additional pictures. The printed ratios compare the cost of one additional
picture with the loop's cost of one picture. The remaining cost of an ingest does not depend on the number of pictures.
Costs are given in wall seconds and in CPU seconds of all processes together, because CPU seconds depend less on other
work on the machine. Before the measurement, the ingest of a third file warms up Spark's JVM (heap and compiled code).
This file has as many pictures as the small file. Memory is resident memory, sampled five times a second from /proc
(Linux).
"""

from __future__ import annotations

import base64
import csv
import io
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from measure import make, peak_by_process, processor_seconds
from PIL import Image
from pyspark.sql import SparkSession

from pipelines.config import DataConfig, LocalPlatformConfig
from pipelines.driver.ingest.run import ingest
from pipelines.platform import Platform, local

KINDS = {
    "photo, 640 x 480 JPEG": (2000, {"side": 640, "height": 480, "kind": "JPEG"}),
    "field, 1024 x 1024 PNG": (150, {"side": 1024, "kind": "PNG"}),
    "emoji, 72 x 72 PNG": (5000, {"side": 72, "kind": "PNG"}),
}
"""Dict from each kind of picture to the number of pictures in the small file and the options of `make`."""


class Took(NamedTuple):
    """Cost of a function call: wall seconds, CPU seconds, and peak resident bytes of each kind of process."""

    wall: float
    processor: float
    peaks: dict[str, int]


def bare(text: str) -> tuple[int, int]:
    """Decode the picture of one row to RGB."""
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB").size


def loop(path: Path, cores: int) -> int:
    """Run the plain loop over a CSV file and return the number of pictures."""
    csv.field_size_limit(sys.maxsize)
    with path.open(newline="") as file, multiprocessing.get_context("fork").Pool(cores) as pool:
        texts = (row["b64string_images"] for row in csv.DictReader(file))
        return sum(1 for _ in pool.imap_unordered(bare, texts, chunksize=8))


def took(work: Callable[[], object]) -> Took:
    """Run a function and measure its cost."""
    with peak_by_process() as peaks:
        wall, processor = time.monotonic(), processor_seconds()
        work()
        return Took(time.monotonic() - wall, processor_seconds() - processor, peaks)


def ingested(spark: SparkSession, platform: Platform, path: Path) -> Took:
    """Measure the ingest of a file."""
    config = DataConfig.model_validate({"source": {"path": str(path)}})
    return took(lambda: ingest(spark, platform, path.stem, config))


def compare(spark: SparkSession, platform: Platform, folder: Path, name: str, cores: int) -> None:
    """Measure one kind of picture and print the results."""
    count, options = KINDS[name]
    small, large = folder / f"{name[:5]}-1.csv", folder / f"{name[:5]}-4.csv"
    make(small, count, **options)  # type: ignore[arg-type]
    make(large, 4 * count, **options, seed=1)  # type: ignore[arg-type]
    make(warm := folder / f"{name[:5]}-0.csv", count, **options, seed=2)  # type: ignore[arg-type]
    alone = took(lambda: loop(large, cores))
    ingested(spark, platform, warm)
    once, four = ingested(spark, platform, small), ingested(spark, platform, large)
    again = ingested(spark, platform, large)
    further = 3 * count
    wall, processor = (max(b - a, 1e-9) / further for a, b in zip(once[:2], four[:2], strict=True))
    loop_wall, loop_processor = alone.wall / (4 * count), alone.processor / (4 * count)
    print(f"{name}, {count} and {4 * count} of them, {cores} cores")
    print(f"  bare Pillow loop {1 / loop_wall:8.1f} /s  {1e3 * loop_processor:6.2f} ms of CPU time per picture")
    print(f"  lakesight ingest {1 / wall:8.1f} /s  {1e3 * processor:6.2f} ms of CPU time per picture")
    print(f"  ratio of wall time {loop_wall / wall:.2f}, of CPU time {loop_processor / processor:.2f}")
    print(f"  fixed cost of an ingest {once.wall - wall * count:.1f} s; ingesting it again {again.wall:.1f} s")
    grown = (f"{kind} {peak / 1e6:.0f}, {four.peaks[kind] / 1e6:.0f}" for kind, peak in once.peaks.items())
    print(f"  peak memory in MB, and at four times the size: {'; '.join(grown)}", flush=True)


def main() -> None:
    """Measure every kind of picture."""
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LAKESIGHT_HOME"] = folder
        platform = local(LocalPlatformConfig())
        spark = platform.open_spark()
        for name in KINDS:
            compare(spark, platform, Path(folder), name, cores)
        spark.stop()


if __name__ == "__main__":
    main()

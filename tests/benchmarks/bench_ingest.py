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
from pathlib import Path

from measure import make, measured
from PIL import Image

from pipelines.config import DataConfig, LocalPlatformConfig
from pipelines.driver.ingest import ingest
from pipelines.platform import local

MADE, SIDE, WARM_UP = 200, 1024, 20


def bare(text: str) -> tuple[int, int]:
    """What a loop without a lakehouse does with one row."""
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB").size


def loop(path: Path, cores: int) -> int:
    """The bare loop over a CSV file; the number of pictures."""
    csv.field_size_limit(sys.maxsize)
    with path.open(newline="") as file, multiprocessing.get_context("fork").Pool(cores) as pool:
        texts = (row["b64string_images"] for row in csv.DictReader(file))
        return sum(1 for _ in pool.imap_unordered(bare, texts, chunksize=8))


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

"""Speed of sharding compared with a plain loop that decodes and resizes the same pictures on the same cores.

    python tests/benchmarks/bench_shard.py

Pictures of 640 x 480 (JPEG) and of 1024 x 1024 (PNG) are resized to 224 x 224 pixels. The loop has the encoded pictures
in memory and discards the decoded pixels. Sharding reads the pictures from Delta, sorts them and writes files. The loop
and sharding are measured first with some of the pictures, then with all pictures. The difference between the two
measurements is the cost of the additional pictures, without the fixed cost of a command. Times are CPU seconds of all
processes together, so that other work on the machine does not change the result. Memory is the resident memory of all
processes together, sampled five times a second from /proc (Linux).
"""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.dataset as ds
from deltalake import DeltaTable
from measure import make, peak_memory, processor_seconds
from PIL import Image

from pipelines.config import DataConfig, LocalPlatformConfig
from pipelines.driver.ingest.run import ingest
from pipelines.driver.shard.run import shard
from pipelines.platform import local
from vlm.config import ImageConfig

SIZE = 224
COUNTS = {"JPEG": (1500, 7500), "PNG": (100, 500)}
SIDES = {"JPEG": (640, 480), "PNG": (1024, 1024)}


class Cost(NamedTuple):
    """CPU seconds per picture, CPU seconds that do not depend on the number of pictures, and peak memory in MB."""

    picture: float
    fixed: float
    peak: float


def bare(data: bytes) -> int:
    """Decode and resize one picture."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return len(np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)))


def loop(images: list[bytes], cores: int) -> None:
    """Run the plain loop over pictures with one process per core."""
    with multiprocessing.get_context("fork").Pool(cores) as pool:
        for _ in pool.imap_unordered(bare, images, chunksize=8):
            pass


def cost(work: Callable[[int], object], counts: tuple[int, int]) -> Cost:
    """Measure `work` with two numbers of pictures, and compute the cost from the difference."""
    used = []
    with peak_memory() as samples:
        for count in counts:
            before = processor_seconds()
            work(count)
            used.append(processor_seconds() - before)
    picture = (used[1] - used[0]) / (counts[1] - counts[0])
    return Cost(picture, used[0] - picture * counts[0], max(samples) / 1e6)


def main() -> None:
    """Measure each kind of picture and print the table."""
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LAKESIGHT_HOME"] = folder
        platform = local(LocalPlatformConfig())
        spark = platform.open_spark()
        for kind, counts in COUNTS.items():
            path = Path(folder) / f"{kind}.csv"
            make(path, counts[1], SIDES[kind][0], kind, SIDES[kind][1])
            config = {"source": {"path": str(path)}, "split": {"kind": "hash", "val": 0, "test": 0}}
            ingest(spark, platform, kind, DataConfig.model_validate(config | {"near_duplicates": False}))

            def packed(count: int, kind: str = kind, config: dict[str, object] = config, draft: bool = False) -> None:
                chosen = {"where": f"CAST(substring(texts[0].text, 9) AS INT) < {count}", "draft": draft}
                data = DataConfig.model_validate(config | {"shards": chosen})
                shard(spark, platform, kind, data, ImageConfig(size=SIZE), "train")

            table = DeltaTable(str(platform.folder("shards").parent / "warehouse" / "samples")).to_pyarrow_dataset()
            images = table.to_table(columns=["image"], filter=ds.field("source") == kind).column("image").to_pylist()
            packed(10)
            costs = {
                "bare loop": cost(lambda count: loop(images[:count], cores), counts),  # noqa: B023 called at once
                "lakesight shard": cost(packed, counts),
                "with draft": cost(partial(packed, draft=True), counts),
            }
            print(f"{counts[1]} {kind} of {SIDES[kind][0]} x {SIDES[kind][1]} to {SIZE} x {SIZE}, {cores} cores")
            for name, (picture, fixed, peak) in costs.items():
                ratio = costs["bare loop"].picture / picture
                print(f"{name:16} {picture * 1e3:7.2f} ms/picture, {fixed:5.1f} s, {peak:6.0f} MB, ratio {ratio:.2f}")
        spark.stop()


if __name__ == "__main__":
    main()

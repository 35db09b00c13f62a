"""Cost of the stages at growing table sizes: a stage that reads only new rows must cost the same at each size.

    python tests/benchmarks/bench_growth.py [ROWS ...]

For each table size, the benchmark fills the table with copies of one row, which has a picture of 24 x 16 pixels, and
captions the copies with a tiny model. Then the benchmark measures four stages: an ingest of 1,000 new rows, a
captioning job for these rows, a repeated ingest that finds nothing new, and the writing of shards of the train split at
16 x 16 pixels. All sizes are measured in one Spark session and on one table, which grows from size to size. A first
round warms Spark up; this round is not printed.

"growth" is the ratio of the CPU seconds at the largest and at the smallest size. "exponent" is the exponent e for which
the CPU seconds grow as ROWS ** e: 0 for a stage whose cost does not depend on the size, 1 for a stage that reads
every row.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from measure import make, peak_by_process, processor_seconds
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from pipelines.config import DataConfig, LocalPlatformConfig
from pipelines.driver.caption.run import CaptionRequest, caption
from pipelines.driver.ingest.run import ingest
from pipelines.driver.model_files import ModelFiles
from pipelines.driver.shard.run import shard
from pipelines.executor.ingest.fingerprint import FINGERPRINT_BYTES
from pipelines.platform import Platform, local
from vlm.config import ImageConfig

sys.path.append(str(Path(__file__).parents[1] / "support"))
from tiny_runs import save_random_model

WARM_UP, SIZES = 1_000, (2_000, 8_000, 32_000)
NEW = 1_000
STAGES = ("ingest of new rows", "captions of new rows", "ingest without new rows", "shards of all rows")


class Cost(NamedTuple):
    """CPU seconds of all processes, seconds by the clock, and peak memory of the driver and of the JVM in MB."""

    processor: float
    clock: float
    driver: float
    jvm: float


def fill(spark: SparkSession, platform: Platform, rows: int) -> None:
    """Fill the table to `rows` rows in one commit, with copies of one row that have new ids and fingerprints."""
    table = platform.table("samples")
    there = spark.table(table)
    count = there.count()
    one = there.limit(1).drop("image_id", "sha256", "fingerprint")
    numbers = spark.range(count, rows, numPartitions=4)
    hashes = (F.sha2(F.concat_ws(":", "id", F.lit(part)), 512) for part in range(-(-FINGERPRINT_BYTES // 64)))
    values = {
        "sha256": F.sha2(F.col("id").cast("string"), 256),
        "image_id": F.concat_ws("/", "source", "id"),
        "fingerprint": F.substring(F.unhex(F.concat(*hashes)), 1, FINGERPRINT_BYTES),
    }
    copies = numbers.crossJoin(F.broadcast(one)).withColumns(values)
    copies.select(there.columns).write.format("delta").mode("append").saveAsTable(table)


def measure(work: Callable[[], object]) -> Cost:
    """Call a function and measure the call."""
    with peak_by_process() as peaks:
        before, started = processor_seconds(), time.monotonic()
        work()
        processor, clock = processor_seconds() - before, time.monotonic() - started
    return Cost(processor, clock, peaks["driver"] / 1e6, peaks["JVM"] / 1e6)


class Stages(NamedTuple):
    """Stages that are measured, with tables in a temporary home folder."""

    spark: SparkSession
    platform: Platform
    model: ModelFiles
    folder: Path

    def run(self, size: int) -> list[Cost]:
        """Fill the tables to `size` rows, and measure each stage."""
        spark, platform = self.spark, self.platform
        if size > WARM_UP:
            fill(spark, platform, size)
        request = CaptionRequest(source_table=platform.table("samples"), id_column="image_id", image_column="image")
        if size > WARM_UP:
            caption(spark, platform, self.model, request)
        path = self.folder / f"new-{size}.csv"
        make(path, NEW, 24, height=16, seed=size)
        data = DataConfig.model_validate(
            {"source": {"path": str(path)}, "split": {"kind": "hash", "val": 0, "test": 0}}
        )
        return [
            measure(lambda: ingest(spark, platform, "bench", data)),
            measure(lambda: caption(spark, platform, self.model, request)),
            measure(lambda: ingest(spark, platform, "bench", data)),
            measure(lambda: shard(spark, platform, "bench", data, ImageConfig(size=16), "train")),
        ]


def main() -> None:
    """Measure every table size, and print a line for each stage."""
    sizes = sorted(int(word) for word in sys.argv[1:]) or list(SIZES)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LAKESIGHT_HOME"] = folder
        platform = local(LocalPlatformConfig())
        save_random_model(Path(folder, "model"))
        model = ModelFiles(folder=Path(folder, "model"), name="tiny", version="1", run_id="r")
        stages = Stages(platform.open_spark(), platform, model, Path(folder))
        stages.run(WARM_UP)
        found = {size: stages.run(size) for size in sizes}
        print("CPU seconds / seconds by the clock (peak MB of the driver, of the JVM)")
        titles = "".join(f"{f'{size:,} rows':>34}" for size in sizes)
        print(f"{'stage':<24}{titles}{'growth':>9}{'exponent':>10}")
        for number, stage in enumerate(STAGES):
            costs = [found[size][number] for size in sizes]
            cells = [f"{c.processor:.1f} / {c.clock:.1f} s ({c.driver:,.0f}, {c.jvm:,.0f} MB)" for c in costs]
            growth = costs[-1].processor / costs[0].processor
            exponent = math.log(growth) / math.log(sizes[-1] / sizes[0])
            print(f"{stage:<24}" + "".join(f"{cell:>34}" for cell in cells) + f"{growth:>9.2f}{exponent:>10.2f}")
        stages.spark.stop()


if __name__ == "__main__":
    main()

"""Cost of ingesting a few new rows, and of sharding, at growing table sizes. The measured figures are in docs/data.md.

    python tests/benchmarks/bench_scale.py [ROWS ...]

For each table size, the benchmark fills the table with copies of one row, which has a picture of 24 x 16 pixels. Then
the benchmark ingests 200 new rows, and writes shards of the train split at 16 x 16 pixels. At the end, the benchmark
runs the maintenance of the tables. In the output, figures before the slash are CPU seconds of all processes
together, and figures after the slash are wall seconds. The table grows from size to size in the same Spark session, so
Spark is warm from the second size on.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from measure import make, processor_seconds
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from pipelines.config import DataConfig, LocalPlatformConfig
from pipelines.driver.delta.maintain import maintain
from pipelines.driver.ingest.run import ingest
from pipelines.driver.shard.run import shard
from pipelines.platform import Platform, local
from vlm.config import ImageConfig

SIZES = (5_000, 20_000, 80_000)
NEW = 200


def fill(spark: SparkSession, platform: Platform, rows: int) -> int:
    """In one commit, add copies of one row with new ids until the table has `rows` rows. Return `rows`."""
    table = platform.table("samples")
    there = spark.table(table)
    count = there.count()
    one = there.limit(1).drop("image_id", "sha256")
    numbers = spark.range(count, rows, numPartitions=4)
    sha256 = F.sha2(F.col("id").cast("string"), 256)
    copies = numbers.crossJoin(F.broadcast(one)).withColumns(
        {"sha256": sha256, "image_id": F.concat_ws("/", "source", "id")}
    )
    copies.select(there.columns).write.format("delta").mode("append").saveAsTable(table)
    return rows


def timed(work: Callable[[], object]) -> str:
    """Call a function, and return its CPU seconds and wall seconds as one text."""
    before, started = processor_seconds(), time.monotonic()
    work()
    return f"{processor_seconds() - before:6.1f} / {time.monotonic() - started:.1f} s"


def main() -> None:
    """Measure every table size and print a line for each size."""
    sizes = [int(word) for word in sys.argv[1:]] or list(SIZES)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LAKESIGHT_HOME"] = folder
        platform = local(LocalPlatformConfig())
        spark = platform.open_spark()

        def config(name: str, seed: int, count: int) -> DataConfig:
            path = Path(folder) / f"{name}.csv"
            make(path, count, 24, height=16, seed=seed)
            return DataConfig.model_validate(
                {"source": {"path": str(path)}, "split": {"kind": "hash", "val": 0, "test": 0}}
            )

        ingest(spark, platform, "bench", config("first", 1, 20))
        shard(spark, platform, "bench", config("first", 1, 20), ImageConfig(size=16), "train")
        print(f"{'rows':>8}  {'ingest of 200 more':>20}  {'shard of all':>20}", flush=True)
        for size in sizes:
            rows = fill(spark, platform, size)
            data = config(f"new-{size}", size, NEW)
            ingested = timed(lambda: ingest(spark, platform, "bench", data))  # noqa: B023 called at once
            sharded = timed(lambda: shard(spark, platform, "bench", data, ImageConfig(size=16), "train"))  # noqa: B023
            print(f"{rows:>8}  {ingested:>20}  {sharded:>20}", flush=True)
        print("maintain:", timed(lambda: maintain(spark, platform)))
        spark.stop()


if __name__ == "__main__":
    main()

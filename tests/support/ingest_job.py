"""Script that ingests a folder of CSV files and writes shards. Tests kill the process of this script.

LAKESIGHT_HOME=HOME python ingest_job.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from pictures import as_base64, png, write_csv
from pyspark.sql import SparkSession
from tiny_runs import tiny_model_config

from pipelines.config import DataConfig, LocalPlatformConfig
from pipelines.driver.ingest.run import ingest
from pipelines.driver.shard.run import shard
from pipelines.platform import Platform, local

SOURCE = "killed"


def write_rows(folder: Path, first: int, count: int) -> dict[str, str]:
    """Write a CSV file of good rows, with a bad row after each good row whose number is a multiple of ten.

    Returns:
        A dict from the text of each good row to the bytes of the row's picture, in hexadecimal.
    """
    rows = []
    for n in range(first, first + count):
        rows += [[as_base64(png(n)), f"picture {n}"]] + ([[f"?{n}", "bad"]] if n % 10 == 0 else [])
    write_csv(folder / f"from-{first}.csv", rows)
    return {f"picture {n}": png(n).hex() for n in range(first, first + count)}


def ingest_and_shard(spark: SparkSession, platform: Platform, source: str, folder: Path) -> None:
    """Ingest the folder's files and write shards of the split train."""
    config = DataConfig.model_validate(
        {"source": {"path": str(folder)}, "split": {"kind": "hash", "val": 0, "test": 0}}
    )
    ingest(spark, platform, source, config)
    shard(spark, platform, source, config, tiny_model_config().image, "train")


if __name__ == "__main__":
    local_platform = local(LocalPlatformConfig())
    session = local_platform.open_spark()
    (local_platform.root / "started").touch()
    ingest_and_shard(session, local_platform, SOURCE, Path(sys.argv[1]))
    session.stop()

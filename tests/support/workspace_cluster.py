"""Script that acts as a job cluster of a simulated workspace and runs the tasks of a job one after another.

python workspace_cluster.py VOLUME TRACKING_URI NAMESPACE < TASKS

TASKS is a JSON list of the parameters of wheel tasks. The script starts the Spark session before the first task. As in
an ML runtime, the distributions `mlflow` and `delta-spark` do not exist, although their modules do. The catalog of
tables is a Hive metastore in the working folder. Like Unity Catalog, the metastore knows the tables of earlier
clusters.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import jobs.common
import jobs.doctor
from jobs.cli import main
from pipelines.config import LocalPlatformConfig, PlatformConfig, SparkConfig
from pipelines.platform import Platform, local, open_platform

ABSENT = ("mlflow", "delta-spark")
CATALOG = {"spark.sql.catalogImplementation": "hive"}


def without_distributions(patch: pytest.MonkeyPatch) -> None:
    """Hide the distributions that an ML runtime does not have."""
    usual = importlib.metadata.Distribution.from_name

    def from_name(name: str) -> importlib.metadata.Distribution:
        if name in ABSENT:
            raise importlib.metadata.PackageNotFoundError(name)
        return usual(name)

    patch.setattr(importlib.metadata.Distribution, "from_name", from_name)


def run_tasks(volume: Path, tracking_uri: str, namespace: str, tasks: list[list[str]]) -> None:
    """Run the tasks in a workspace with the given Volume, tracking server and schema."""
    config = SparkConfig(master="local[2]", driver_memory="1g", conf=CATALOG)
    spark = local(LocalPlatformConfig(spark=config)).open_spark()
    spark.sql(f"CREATE SCHEMA IF NOT EXISTS {namespace}")

    def opened(config: PlatformConfig) -> Platform:
        return replace(open_platform(config), root=volume, tracking_uri=tracking_uri, registry_uri=tracking_uri)

    with pytest.MonkeyPatch.context() as patch:
        without_distributions(patch)
        patch.setenv("DATABRICKS_RUNTIME_VERSION", "18.0")
        for module in (jobs.common, jobs.doctor):
            patch.setattr(module, "open_platform", opened)
        for parameters in tasks:
            print(f"== {parameters[0]}", flush=True)
            patch.setattr(sys, "argv", ["lakesight", *parameters])
            main()
    spark.stop()


if __name__ == "__main__":
    assert os.environ["LAKESIGHT_HOME"]  # the home folder holds Spark's log and the data files of tables
    run_tasks(Path(sys.argv[1]), sys.argv[2], sys.argv[3], json.load(sys.stdin))

"""Spark drivers in separate processes: with a given master, with GPU resources, or several drivers at the same time.

python spark_drivers.py MASTER RUN_DIR...
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

import pyspark
from processes import TEST_PATH
from rank_faults import wait_for

from pipelines.config import LocalPlatformConfig, SparkConfig
from pipelines.driver.train.launch import GPU_AMOUNT, run_rank
from pipelines.driver.train.run import launch
from pipelines.errors import UserError
from pipelines.formats.run_folder import RunFolder, read_json, write_json
from pipelines.platform import local
from vlm.config import Config


class RankPlacement(Config):
    """Content of the file places/N: agent, rendezvous, local rank and GPUs of rank N."""

    agent: int
    """Process id of the torchrun agent, or of the driver."""
    rendezvous: str
    """Port of torchrun's store, or path of the driver's file store."""
    local_rank: int
    gpus: str


def placed_rank(run_dir: str) -> None:
    """Write this rank's placement, wait for all ranks of all runs in the parent folder, then call `run_rank`."""
    rank, world_size = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
    placement = RankPlacement(
        agent=os.getppid(),
        rendezvous=os.environ.get("LAKESIGHT_STORE") or os.environ["MASTER_PORT"],
        local_rank=int(os.environ["LOCAL_RANK"]),
        gpus=os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    )
    write_json(Path(run_dir) / "places" / rank, placement)
    folders = [path.parent / "places" for path in Path(run_dir).parent.glob("*/run.json")]

    def all_started() -> bool:
        return all(len(list(places.glob("[0-9]*"))) == world_size for places in folders)

    wait_for(all_started, seconds=240)
    assert all_started(), "ranks of another run have not started"
    run_rank(run_dir)


def placements_of(run: RunFolder) -> list[RankPlacement]:
    """Read the placements of a run, sorted by rank."""
    return [read_json(path, RankPlacement) for path in sorted((run.path / "places").glob("[0-9]*"))]


def driver_environment(home: Path) -> dict[str, str]:
    """Return the environment variables of a driver that has the given home folder and uses the loopback address."""
    return os.environ | {"LAKESIGHT_HOME": str(home), "PYTHONPATH": TEST_PATH, "SPARK_LOCAL_IP": "127.0.0.1"}


def run_drivers(
    home: Path, master: str, *tasks: Sequence[RunFolder], settings: Mapping[str, str] | None = None
) -> list[dict[str, str]]:
    """Start several drivers at the same time. Each driver launches a list of runs one after the other.

    Returns:
        One dict per driver, from the name of each refused run to the error message of the launch.
    """
    options = [f"--conf {key}={value}" for key, value in (settings or {}).items()]
    environment = driver_environment(home) | {"PYSPARK_SUBMIT_ARGS": " ".join([*options, "pyspark-shell"])}
    with started_processes() as start:
        drivers = [
            start([sys.executable, __file__, master, *(str(run.path) for run in runs)], environment, subprocess.PIPE)
            for runs in tasks
        ]
        printed = [driver.communicate()[0] for driver in drivers]
    codes = [driver.returncode for driver in drivers]
    assert not any(codes), f"drivers ended with {codes}; their output is on stderr"
    return list(map(json.loads, printed))


@contextmanager
def standalone_cluster(folder: Path, *, workers: int, cores: int, cores_per_application: int) -> Iterator[str]:
    """Start a standalone Spark cluster on this machine and yield the address of its master."""
    environment = os.environ | {
        "SPARK_HOME": str(Path(pyspark.__file__).parent),
        "SPARK_LOCAL_DIRS": str(folder / "local"),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_MASTER_OPTS": f"-Dspark.deploy.defaultCores={cores_per_application}",
        "PYTHONPATH": TEST_PATH,
    }
    launcher = f"{environment['SPARK_HOME']}/bin/spark-class"
    common = ["--host", "127.0.0.1", "--port", "0", "--webui-port", "0"]
    size = ["--cores", str(cores), "--memory", "8g", "--work-dir", str(folder / "work")]
    with started_processes() as start, (folder / "master.log").open("wb") as log:
        start([launcher, "org.apache.spark.deploy.master.Master", *common], environment, log)
        wait_for(lambda: "I have been elected leader" in (folder / "master.log").read_text(), seconds=120)
        (master,) = re.findall(r"Starting Spark master at (spark://\S+)", (folder / "master.log").read_text())
        for _ in range(workers):
            start([launcher, "org.apache.spark.deploy.worker.Worker", *common, *size, master], environment, log)
        yield master


Start = Callable[[list[str], dict[str, str], IO[bytes] | int], subprocess.Popen[bytes]]
"""Function that starts a process from a command, environment variables, and a destination for stdout."""


@contextmanager
def started_processes() -> Iterator[Start]:
    """Yield a function that starts processes. All started processes and their children are ended after the block."""
    started: list[subprocess.Popen[bytes]] = []

    def start(command: list[str], environment: dict[str, str], out: IO[bytes] | int) -> subprocess.Popen[bytes]:
        error = None if out == subprocess.PIPE else out
        started.append(subprocess.Popen(command, env=environment, stdout=out, stderr=error, process_group=0))
        return started[-1]

    try:
        yield start
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in reversed(started):
                with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, number)
                    process.wait(30)


def main() -> None:
    master, *folders = sys.argv[1:]
    runs = [RunFolder(Path(folder)) for folder in folders]
    platform = local(LocalPlatformConfig(spark=SparkConfig(master=master, driver_memory="1g")))
    spark, refused = platform.open_spark(), {}
    for run in runs:
        ranks = replace(
            platform.launch, ranks=run.read_run().world_size, use_gpu=spark.conf.get(GPU_AMOUNT, None) is not None
        )
        try:
            launch(run, replace(platform, launch=ranks), lambda: spark, placed_rank)
        except UserError as error:
            refused[run.path.name] = str(error)
    spark.stop()
    print(json.dumps(refused))


if __name__ == "__main__":
    importlib.import_module("spark_drivers").main()  # ranks import `placed_rank` by the name of its module

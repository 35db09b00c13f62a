"""Drivers of their own: on other masters than the session has that tests share, with GPUs, several at once.

python spark_drivers.py MASTER RUN_DIR...
"""

from __future__ import annotations

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
from pipelines.formats.run_folder import RunDir, read_json, write_json
from pipelines.platform import local
from vlm.config import Config


class Place(Config):
    """places/N: where rank N was started."""

    agent: int
    """The process of torchrun that has started it."""
    port: str
    """At which the ranks meet."""
    local_rank: int
    gpus: str


def placed_rank(run_dir: str) -> None:
    """`run_rank`, once this rank and all others, those of the runs beside this one too, have said where they are."""
    rank, world_size = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
    place = Place(
        agent=os.getppid(),
        port=os.environ["MASTER_PORT"],
        local_rank=int(os.environ["LOCAL_RANK"]),
        gpus=os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    )
    write_json(Path(run_dir) / "places" / rank, place)
    beside = [path.parent / "places" for path in Path(run_dir).parent.glob("*/run.json")]

    def all_there() -> bool:
        return all(len(list(places.glob("[0-9]*"))) == world_size for places in beside)

    wait_for(all_there, seconds=240)
    assert all_there(), "ranks of another run have not started"
    run_rank(run_dir)


def places_of(run: RunDir) -> list[Place]:
    """By rank."""
    return [read_json(path, Place) for path in sorted((run.path / "places").glob("[0-9]*"))]


def driver_environment(home: Path) -> dict[str, str]:
    """Of a driver that keeps to itself and to this machine."""
    return os.environ | {"LAKESIGHT_HOME": str(home), "PYTHONPATH": TEST_PATH, "SPARK_LOCAL_IP": "127.0.0.1"}


def run_drivers(
    home: Path, master: str, *tasks: Sequence[RunDir], settings: Mapping[str, str] | None = None
) -> list[dict[str, str]]:
    """Drivers at the same time, each of which launches some runs one after another.

    Returns:
        By driver, the runs that were refused, by name, and why.
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
    assert not any(codes), f"drivers ended with {codes}; what they said is on stderr"
    return list(map(json.loads, printed))


@contextmanager
def standalone_cluster(folder: Path, *, workers: int, cores: int, cores_per_application: int) -> Iterator[str]:
    """A master of Spark's own cluster manager, and workers on this machine; yields its address."""
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
"""Command, environment, and where stdout goes."""


@contextmanager
def started_processes() -> Iterator[Start]:
    """Starts processes; those that are left at the end of the block are ended, with whatever they have started."""
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
    runs = [RunDir(Path(folder)) for folder in folders]
    platform = local(LocalPlatformConfig(spark=SparkConfig(master=master, driver_memory="1g")))
    spark, refused = platform.open_spark(), {}
    for run in runs:
        how = replace(
            platform.launch, ranks=run.read_run().world_size, use_gpu=spark.conf.get(GPU_AMOUNT, None) is not None
        )
        try:
            launch(run, replace(platform, launch=how), spark, placed_rank)
        except UserError as error:
            refused[run.path.name] = str(error)
    spark.stop()
    print(json.dumps(refused))


if __name__ == "__main__":
    main()

"""Overhead of a training run: the cost of a second rank, of waiting for data, of checkpoints, and of logging
metrics to MLflow.

    python tests/benchmarks/bench_ranks.py

The model is `seemore` in full size, and the pictures are generated. torchrun starts the ranks. The number of cores
equals the number of ranks, and each rank has one thread. In the run with two ranks, each rank processes half of the
batch that a single rank would process. Two simultaneous runs, each with one rank, show the speed of two cores without
communication. An all-reduce of the gradients, without any other work, shows the cost of communication. One run writes a
checkpoint after every step, and another run writes a single checkpoint at the end. The difference between the times of
the two runs is the cost of checkpoints. The cost of logging is measured on finished runs; this is a cost of the driver,
not of the ranks.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import count, pairwise
from pathlib import Path

import torch
from measure import make, processor_seconds
from safetensors.torch import load_file
from torch import distributed

from pipelines.config import load_run
from pipelines.driver.ingest.run import ingest
from pipelines.driver.shard.run import shard
from pipelines.driver.train.run import prepare
from pipelines.formats.run_folder import RunFolder
from pipelines.platform import Platform, open_platform
from pipelines.tracking.runs import follow

ROWS, BATCH, STEPS, ROUNDS = 2048, 32, 16, 5
ADD_UP = "add-up"
"""Command-line argument that makes this script act as a rank; the next argument is the number of gradients."""
SETTINGS = (
    f"train.batch_size={BATCH}",
    "train.validate_every=100000",
    "train.log_every=1",
    "train.keep_checkpoints=1",
    "data.validate_on=train",
)


class Runs:
    """Shards of ingested pictures, used to make run folders with different seeds."""

    def __init__(self, file: Path) -> None:
        self._seeds, self._file = count(), file
        config = load_run("seemore", overrides=[*SETTINGS, f"data.source.path={file}"])
        self.platform: Platform = open_platform(config.platform)
        spark = self.platform.open_spark()
        ingest(spark, self.platform, "seemore", config.data)
        self._shards = shard(spark, self.platform, "seemore", config.data, config.model.image, "train")
        spark.stop()

    def new(self, ranks: int, *, steps: int = STEPS, checkpoint_every: int = 100_000) -> RunFolder:
        """Write the run folder of a new run."""
        own = [f"train.seed={next(self._seeds)}", f"train.steps={steps}", f"platform.ranks={ranks}"]
        own += [f"train.checkpoint_every={checkpoint_every}", f"data.source.path={self._file}"]
        config = load_run("seemore", overrides=[*SETTINGS, *own])
        return prepare(config, open_platform(config.platform), self._shards, self._shards)


def start(ranks: int, core: int, *work: str) -> subprocess.Popen[bytes]:
    """Start ranks with torchrun, on as many cores as there are ranks. Each rank therefore uses one thread."""
    command = [
        "taskset",
        "-c",
        f"{core}-{core + ranks - 1}",
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
    ]
    return subprocess.Popen([*command, *work], stderr=subprocess.DEVNULL)


def trained(*runs: RunFolder, ranks: int = 1) -> float:
    """Train all runs at the same time; return the samples per second of all runs together after the first steps."""
    worker = ("-m", "pipelines.worker.main", "--run-dir")
    processes = [start(ranks, core, *worker, str(run.path)) for core, run in enumerate(runs)]
    assert not any(process.wait() for process in processes), "a run has failed"
    return sum(BATCH / statistics.median(steps_of(run)) for run in runs)


def steps_of(run: RunFolder) -> list[float]:
    """Return the seconds of each step, without the first four steps and the last step. The last step validates."""
    return [after.time - before.time for before, after in pairwise(list(run.read_metrics())[3:-1])]


def scaling(runs: Runs) -> None:
    """Measure a run with one rank, a run with two ranks, and two simultaneous runs with one rank each."""
    found: dict[str, list[float]] = {"one rank": [], "two ranks": [], "one rank, twice": []}
    waits = []
    for _ in range(ROUNDS):
        found["one rank"].append(trained(runs.new(1)))
        both = runs.new(2)
        found["two ranks"].append(trained(both, ranks=2))
        waits += [metrics.values["train/data_wait"] for metrics in list(both.read_metrics())[3:]]
        found["one rank, twice"].append(trained(runs.new(1), runs.new(1)))
    for name, rates in found.items():
        times = [rate / alone for rate, alone in zip(rates, found["one rank"], strict=True)]
        each = ", ".join(f"{ratio:.2f}" for ratio in sorted(times))
        print(
            f"{name:16} {statistics.median(rates):6.1f} samples/s  {statistics.median(times):.2f} x ({each})",
            flush=True,
        )
    print(
        f"waiting for data, two ranks: {statistics.median(waits):.4f} of a step, at most {max(waits):.4f}", flush=True
    )
    weights = load_file(both.finished_checkpoints()[-1] / "model.safetensors")
    assert not start(2, 0, __file__, ADD_UP, str(sum(weight.numel() for weight in weights.values()))).wait()


def add_up(count: int) -> None:
    """Act as a rank that only measures the all-reduce of `count` gradients, in buckets of DDP's size."""
    distributed.init_process_group("gloo")
    buckets = torch.split(torch.randn(count), 25 * 2**20 // 4)
    taken = []
    for _ in range(4 * STEPS):
        distributed.barrier()
        began = time.perf_counter()
        for sent in [distributed.all_reduce(bucket, async_op=True) for bucket in buckets]:
            sent.wait()
        taken.append(time.perf_counter() - began)
    if distributed.get_rank() == 0:
        print(f"all-reduce of {4 * count / 1e6:.0f} MB alone: {statistics.median(taken) * 1000:.0f} ms", flush=True)
    distributed.destroy_process_group()


def checkpoints(runs: Runs) -> None:
    """Measure the wall and CPU seconds that a checkpoint adds to a run."""
    seconds: dict[int, list[tuple[float, float]]] = {1: [], 100_000: []}
    for _ in range(3):
        for every, costs in seconds.items():
            run, before = runs.new(2, checkpoint_every=every), processor_seconds()
            trained(run, ranks=2)
            costs.append((sum(steps_of(run)) / len(steps_of(run)), (processor_seconds() - before) / STEPS))
    often, once = ([statistics.median(cost) for cost in zip(*costs, strict=True)] for costs in seconds.values())
    size = sum(path.stat().st_size for path in run.finished_checkpoints()[-1].iterdir())
    clock, processor = often[0] - once[0], (often[1] - once[1]) * STEPS / (STEPS - 1)
    print(f"a checkpoint of {size / 1e6:.0f} MB: {clock:.2f} s of wall time, {processor:.2f} s of CPU time")
    print(f"at one checkpoint per minute: {clock / 60:.2%} of the wall time, {processor / 120:.2%} of two cores")


def follower(runs: Runs) -> None:
    """Measure the driver's cost of logging the metrics of a run: the cost per logged step."""
    costs = []
    for steps in (STEPS, STEPS, 5 * STEPS):
        run = runs.new(2, steps=steps)
        trained(run, ranks=2)
        before = processor_seconds()
        with follow(run, run.read_run().config, runs.platform):
            pass
        costs.append(processor_seconds() - before)
    _, short, long = costs
    print(f"a logged step costs the driver {(long - short) / (4 * STEPS) * 1000:.1f} ms of CPU time")


def main() -> None:
    """Measure the cost of a second rank, of checkpoints and of logging metrics.

    If the first argument is ADD_UP, this process is one of the measured ranks, and only does the work of a rank.
    """
    if sys.argv[1:2] == [ADD_UP]:
        add_up(int(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as home:
        os.environ["LAKESIGHT_HOME"] = home
        file = Path(home) / "pictures.csv"
        make(file, ROWS, 96)
        runs = Runs(file)
        print(f"seemore, batch {BATCH}, {STEPS} steps, the median of {ROUNDS} rounds in turn")
        scaling(runs)
        checkpoints(runs)
        follower(runs)


if __name__ == "__main__":
    main()

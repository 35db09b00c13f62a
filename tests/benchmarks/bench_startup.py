"""Start-up time of commands: help, lists and tables, one caption, a rollback, and stages that find nothing new.

    python tests/benchmarks/bench_startup.py [OLDER_CHECKOUT]

OLDER_CHECKOUT is a checkout of another commit with an environment `.venv/`. The benchmark first runs a small pipeline,
which takes some minutes. Then all commands of both checkouts run in turn on the same home folder. The table shows
medians: user and system time of the whole command, time by the clock, and peak memory of the largest process. The ratio
is the processor time of the older checkout divided by the processor time of this checkout.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from mlflow import MlflowClient
from PIL import Image

from pipelines.platform import sqlite_uri
from pipelines.scenes import write_scenes

HERE = Path(__file__).parents[2]
ROUNDS = 3
SETTINGS = (
    "data.source.path=scenes.csv",
    *("train.steps=20", "train.batch_size=32", "train.optimizer.warmup_steps=5"),
    *("train.validate_every=20", "train.checkpoint_every=20", "gate.baselines=[]", "gate.min_blind_gap=-10"),
)
SCENES = 500
PROCESSOR, CLOCK = "processor", "clock"
TARGETS = {
    "--help": (0.4, PROCESSOR),
    "config models": (1.5, PROCESSOR),
    "show samples": (1.0, PROCESSOR),
    "quarantine": (1.0, PROCESSOR),
    "ask picture.png --checkpoint checkpoint": (4.0, PROCESSOR),
    "ask picture.png": (4.0, PROCESSOR),
    "rollback": None,
    "ingest": (5.0, CLOCK),
    "shard": (5.0, CLOCK),
    "caption": (5.0, CLOCK),
}
"""Dict from command to its target: seconds of processor time, or seconds by the clock. None means that the only target
is that the command starts no Java process. When the stages are measured, they find nothing new.
"""


class Cost(NamedTuple):
    """Processor seconds, seconds by the clock, and peak memory in MB of a command."""

    processor: float
    clock: float
    memory: float


def run(checkout: Path, words: list[str], folder: Path) -> Cost:
    """Run a `lakesight` command of a checkout in a folder, and measure the command."""
    python = checkout / ".venv" / "bin" / "python"
    command = ["/usr/bin/time", "-f", "%U %S %e %M", "-o", str(folder / "time")]
    command += [
        str(python if python.exists() else sys.executable),
        "-P",
        "-c",
        "from jobs.cli import main; main()",
        *words,
    ]
    environment = os.environ | {"PYTHONPATH": str(checkout), "LAKESIGHT_HOME": str(folder / "home")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed: {done.stderr}")
    user, system, clock, kilobytes = map(float, (folder / "time").read_text().split())
    return Cost(user + system, clock, kilobytes / 1e3)


def prepare(folder: Path) -> None:
    """Run a small pipeline, caption all its pictures, and give the model a previous champion for `rollback`."""
    write_scenes(folder / "scenes.csv", SCENES, seed=0)
    run(HERE, ["pipeline", *(word for setting in SETTINGS for word in ("--set", setting))], folder)
    run(HERE, ["caption"], folder)
    uri = sqlite_uri(folder / "home" / "mlflow.db")
    MlflowClient(uri, registry_uri=uri).set_registered_model_alias("demo", "previous", "1")
    (version,) = (folder / "home" / "models" / "demo").glob("1-*")
    shutil.copytree(version, folder / "checkpoint")
    Image.new("RGB", (64, 64), "red").save(folder / "picture.png")


def main() -> None:
    """Fill a home folder, run each command of each checkout several times in turn, and print the table."""
    older = [Path(each).resolve() for each in sys.argv[1:2]]
    costs: dict[tuple[Path, str], list[Cost]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for _ in range(ROUNDS):
            for command in TARGETS:
                words = command.split()
                if words[0] in ("ingest", "shard"):
                    words += ["--set", SETTINGS[0]]
                for checkout in (*older, HERE):
                    costs.setdefault((checkout, command), []).append(run(checkout, words, folder))
    print("| command | processor s | clock s | memory MB | target | older: processor s | memory MB | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for command, target in TARGETS.items():
        ours = median(costs[HERE, command])
        row = [f"`lakesight {command}`", f"{ours.processor:.2f}", f"{ours.clock:.1f}", f"{ours.memory:.0f}"]
        row.append(f"{target[0]} s of {target[1]}" if target else "no Java")
        for checkout in older:
            theirs = median(costs[checkout, command])
            row += [f"{theirs.processor:.2f}", f"{theirs.memory:.0f}", f"{theirs.processor / ours.processor:.2f}"]
        print(f"| {' | '.join(row)} |")
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


def median(costs: list[Cost]) -> Cost:
    """Return the median of each figure."""
    return Cost(*(statistics.median(column) for column in zip(*costs, strict=True)))


if __name__ == "__main__":
    main()

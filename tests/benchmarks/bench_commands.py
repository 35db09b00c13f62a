"""Start-up time of commands: help, lists and tables, one caption, and stages that find nothing new.

    python tests/benchmarks/bench_commands.py

The table shows user and system time of the whole command, because other programs on the machine change the wall time
more.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

import vlm
from pipelines.config import load_model

ROUNDS = 3
DATA = ("--set", "data.source.path=scenes:200")
COMMANDS = {
    "--help": 0.4,
    "config models": 1.5,
    "show samples": 1.0,
    "quarantine": 1.0,
    "ask picture.png --checkpoint checkpoint": 4.0,
    "ingest": None,
    "shard": None,
}
"""Commands, and the targets of their processor time in seconds. `ingest` and `shard` find nothing new."""


def run(words: list[str], folder: Path) -> tuple[float, float]:
    """Run a `lakesight` command in a folder, and return its processor time and its time by the clock, in seconds."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "LAKESIGHT_HOME": str(folder / "home")}
    command = ["/usr/bin/time", "-f", "%U %S %e", "-o", str(folder / "time")]
    command += [sys.executable, "-c", "from jobs.cli import main; main()", *words]
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True)
    user, system, elapsed = map(float, (folder / "time").read_text().split())
    return user + system, elapsed


def main() -> None:
    """Fill a home folder, run each command several times, and print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Image.new("RGB", (64, 64), "red").save(folder / "picture.png")
        vlm.build(load_model("nano"), ["a large red square"]).save(folder / "checkpoint")
        for stage in ("ingest", "shard"):
            run([stage, *DATA], folder)
        print("| command | CPU seconds | target | seconds by the clock |\n|---|---|---|---|")
        for command, target in COMMANDS.items():
            words = [*command.split(), *(DATA if command in ("ingest", "shard") else ())]
            measured = [run(words, folder) for _ in range(ROUNDS)]
            cpu, elapsed = (statistics.median(column) for column in zip(*measured, strict=True))
            print(f"| `lakesight {command}` | {cpu:.2f} | {target or ''} | {elapsed:.1f} |")


if __name__ == "__main__":
    main()

"""Peak resident memory of each stage of run `demo`, with 100 training steps.

    python tests/benchmarks/bench_memory.py [SCENES]

Five times a second, the benchmark adds up the memory of all processes of the command: driver, JVM, Python workers and
ranks.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

from measure import peak_memory

STAGES = ("ingest", "shard", "train", "evaluate", "promote", "caption")


def main() -> None:
    """Run each stage as a separate command and print the table."""
    scenes = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as home:
        print(f"{scenes} scenes")
        for stage in STAGES:
            command = [sys.executable, "-c", "from jobs.cli import main; main()", stage, "--set"]
            command += [f"data.source.path=scenes:{scenes}", "--set", "train.steps=100", "--set", "gate.baselines=[]"]
            with peak_memory() as samples:
                started = time.monotonic()
                subprocess.run(command, env=os.environ | {"LAKESIGHT_HOME": home}, check=True, capture_output=True)
                seconds = time.monotonic() - started
            print(f"{stage:10}  {max(samples) / 1e6:6.0f} MB  {seconds:6.1f} s", flush=True)


if __name__ == "__main__":
    main()

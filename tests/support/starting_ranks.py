"""Ranks that lose their driver while they start, and a driver that starts one of these ranks.

python starting_ranks.py RUN_DIR FUNCTION
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from rank_faults import wait_for

from pipelines.driver.train.launch import run_rank
from pipelines.driver.train.local_ranks import run_local_ranks
from pipelines.formats.run_folder import Result, RunFolder, write_json
from pipelines.worker.rank.env import RankEnv
from pipelines.worker.rank.failure import RankMonitor


def late_rank(run_dir: str) -> None:
    """Start a rank whose driver dies while Python imports the packages of the rank."""
    _wait_for_the_end_of_the_driver(run_dir)
    run_rank(run_dir)


def late_monitor(run_dir: str) -> None:
    """Start the monitor of a rank whose driver dies immediately before the monitor starts."""
    _wait_for_the_end_of_the_driver(run_dir)
    env = RankEnv.from_environment()
    with RankMonitor(RunFolder(Path(run_dir)), env.rank, env.launcher):
        time.sleep(600)


def stuck_rank(run_dir: str) -> None:
    """Ignore SIGTERM as rank 1, or fail as rank 0 as soon as rank 1 ignores SIGTERM."""
    ready = Path(f"{run_dir}.ready")
    if os.environ["RANK"] == "0":
        wait_for(ready.exists, seconds=60)
        sys.exit(1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready.touch()
    time.sleep(600)


def finishing_rank(run_dir: str) -> None:
    """Write an empty checkpoint folder and the file result.json of a run, without training."""
    run = RunFolder(Path(run_dir))
    run.checkpoint(1).mkdir(parents=True)
    write_json(run.result, Result(status="ok", step=1, world_size=1, checkpoint="", metrics={}, seconds=0.0))


def _wait_for_the_end_of_the_driver(run_dir: str) -> None:
    driver = os.getppid()
    Path(f"{run_dir}.started").write_text(str(os.getpid()))
    wait_for(lambda: os.getppid() != driver, seconds=60)


if __name__ == "__main__":
    import starting_ranks  # ranks import the function by the name of its module

    run_local_ranks(RunFolder(Path(sys.argv[1])), 1, getattr(starting_ranks, sys.argv[2]))

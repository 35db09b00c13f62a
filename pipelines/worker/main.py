"""Entry point of a rank: `run_rank(run_folder)`. On a host without Java, torchrun can start the ranks:

    PYTHONSAFEPATH=1 torchrun --nproc-per-node 2 -m pipelines.worker.main --run-dir DIR

A rank reads only the run folder, the files to which the run folder refers, and the environment variables that torchrun
or the driver sets. If the driver starts the rank, the rank's monitor starts before torch is imported, so that a broken
torch installation is recorded too.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.child_process import drop_other_variables
from pipelines.formats.run_folder import RunFolder
from pipelines.worker.rank.env import RankEnv
from pipelines.worker.rank.failure import RankMonitor
from pipelines.worker.rank.metrics import open_log
from pipelines.worker.rank.start import own_run_as_group

RANK_VARIABLES = (
    "(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)",
    "ROLE_NAME",
    "MASTER_(ADDR|PORT)",
    "LAKESIGHT_(STORE|LAUNCHER)",
    "(FI|UCX|IBV|MLX5|RDMAV)_.+",
)
"""Patterns of the environment variables that describe a rank, its store and its network (libfabric, UCX, verbs)."""


def run_rank(run_folder: str) -> None:
    """Train as one rank of a run, from the last checkpoint to the last step of the run.

    Args:
        run_folder: path of the run folder.

    Raises:
        LakesightError, RuntimeError, ...: any error, after the error is recorded in failures/rank-N.json.
    """
    with _monitored(run_folder) as (run, env, monitor):
        from pipelines.worker.train.run import train
        from pipelines.worker.train.text_trainer import TextTrainer
        from pipelines.worker.train.trainer import Trainer

        is_text = run.read_run().config.model.text_only
        train(run, env, monitor, TextTrainer if is_text else Trainer)


def replay_rank(run_folder: str) -> None:
    """Replay one training step as one rank of a replay, given the run folder of the replay. Record errors in the same
    way as `run_rank`.
    """
    with _monitored(run_folder) as (run, env, monitor):
        from pipelines.worker.train.replay import replay

        replay(run, env, monitor)


@contextmanager
def _monitored(run_folder: str) -> Iterator[tuple[RunFolder, RankEnv, RankMonitor]]:
    """Prepare the process of a rank, and record an error that the block raises.

    Raises:
        SystemExit: the driver has died while this process was starting. No file of the run was changed, because another
            driver may own the run already.
    """
    run, env = RunFolder(Path(run_folder)), RankEnv.from_environment()
    if env.launcher and os.getppid() != env.launcher:
        sys.exit(f"rank {env.rank} ends, because the driver (process {env.launcher}) has died")
    drop_other_variables(*RANK_VARIABLES)
    open_log(run, env.rank)
    with RankMonitor(run, env.rank, env.launcher) as monitor:
        yield run, env, monitor


def main() -> None:
    """Run `run_rank` with the folder given by --run-dir, as soon as rank 0 owns the run."""
    parser = argparse.ArgumentParser(prog="pipelines.worker.main", description="Train as one rank of a run.")
    parser.add_argument("--run-dir", required=True, help="run folder that contains run.json and tokenizer.json")
    folder = parser.parse_args().run_dir
    env = RankEnv.from_environment()
    drop_other_variables(*RANK_VARIABLES)  # before torch is imported
    with own_run_as_group(RunFolder(Path(folder)), env):
        run_rank(folder)


if __name__ == "__main__":
    main()

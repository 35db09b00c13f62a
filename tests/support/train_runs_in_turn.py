"""Rank module that trains several runs one after the other.

Tests train several tiny runs on the same ranks, because starting ranks takes longer than training a tiny run.

torchrun ... -m train_runs_in_turn --run-dir DIR,DIR,...
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed

from pipelines.formats.run_folder import RunFolder
from pipelines.worker.rank.env import RankEnv
from pipelines.worker.rank.failure import RankMonitor
from pipelines.worker.rank.group import process_group
from pipelines.worker.rank.metrics import open_log
from pipelines.worker.train.trainer import Trainer


def main() -> None:
    env, device = RankEnv.from_environment(), torch.device("cpu")
    with process_group(env, device, timeout_seconds=300):
        for folder in sys.argv[sys.argv.index("--run-dir") + 1].split(","):
            run = RunFolder(Path(folder))
            open_log(run, env.rank)
            trainer = Trainer.build(run, run.read_run(), env, RankMonitor(run, env.rank), device)
            trainer.train()
            trainer.checkpoints.wait()
            distributed.barrier()


if __name__ == "__main__":
    main()

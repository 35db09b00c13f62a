"""Ranks that train several runs one after another, because starting ranks takes longer than a tiny run.

torchrun ... -m train_runs_in_turn --run-dir DIR,DIR,...
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed

from pipelines.formats.run_folder import RunDir
from pipelines.worker.rank.env import Place
from pipelines.worker.rank.failure import Watch
from pipelines.worker.rank.group import process_group
from pipelines.worker.rank.metrics import open_log
from pipelines.worker.train.learner import Learner


def main() -> None:
    place, device = Place.from_environment(), torch.device("cpu")
    with process_group(device, timeout_seconds=300):
        for folder in sys.argv[sys.argv.index("--run-dir") + 1].split(","):
            run = RunDir(Path(folder))
            open_log(run, place.rank)
            learner = Learner.build(run, run.read_run(), place, Watch(run, place.rank), device)
            learner.learn()
            learner.checkpoints.wait()
            distributed.barrier()


if __name__ == "__main__":
    main()

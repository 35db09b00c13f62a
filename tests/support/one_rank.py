"""Functions that train in this process as the only rank of a run, and can end the rank at a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed
from torch._C._distributed_c10d import HashStore

from pipelines.formats.run_folder import RunFolder
from pipelines.worker.rank.env import RankEnv
from pipelines.worker.rank.failure import RankMonitor
from pipelines.worker.train.trainer import Trainer


class Killed(BaseException):
    """Exception that ends a rank in the middle of a run."""


class KillingMonitor(RankMonitor):
    """A monitor that ends the rank at a given step."""

    def __init__(self, run: RunFolder, after: int) -> None:
        super().__init__(run, 0)
        self.after = after

    def report_step(self, step: int) -> None:
        if step == self.after:
            raise Killed


@contextmanager
def open_group_of_one() -> Iterator[None]:
    """Open a process group with one rank."""
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def train(run: RunFolder, after: int = 10**6, kind: type[Trainer] = Trainer) -> Trainer:
    """Train from the last checkpoint to the end, or raise Killed when the rank reports step `after`."""
    trainer = kind.build(run, run.read_run(), RankEnv(0, 1, 0, 1), KillingMonitor(run, after), torch.device("cpu"))
    torch.set_num_threads(1)  # `build` makes torch use all cores, but other tests need cores too
    try:
        trainer.train()
    finally:
        trainer.checkpoints.wait()
    return trainer

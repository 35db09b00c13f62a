"""Rank and world size of this process, from the environment variables that torchrun or the driver sets."""

from __future__ import annotations

import os
from dataclasses import dataclass

from pipelines.errors import UserError


@dataclass(frozen=True)
class RankEnv:
    """Number of this rank and number of ranks, both in the whole run and among the ranks of this host."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    store: str = ""
    """Path of the file store through which the ranks connect; empty if the ranks use the TCP store of torchrun."""
    launcher: int = 0
    """Process id of the driver that started this rank on its own host; 0 if torchrun started the rank."""

    @classmethod
    def from_environment(cls) -> RankEnv:
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. If the driver started the rank, also read
        LAKESIGHT_STORE and LAKESIGHT_LAUNCHER.

        Raises:
            UserError: a variable is missing because the process was not started by torchrun.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        missing = [name for name in names if name not in os.environ]
        if missing:
            raise UserError(
                "the process was not started as a rank",
                where="environment variables",
                got=f"no {', '.join(missing)}",
                fix="start the process with "
                "`PYTHONSAFEPATH=1 torchrun --nproc-per-node N -m pipelines.worker.main --run-dir DIR`",
            )
        rank, world_size, local_rank, local_world_size = (int(os.environ[name]) for name in names)
        store, launcher = os.environ.get("LAKESIGHT_STORE", ""), int(os.environ.get("LAKESIGHT_LAUNCHER", "0"))
        return cls(rank, world_size, local_rank, local_world_size, store, launcher)

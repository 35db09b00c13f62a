"""Which of the ranks this process is."""

from __future__ import annotations

import os
from dataclasses import dataclass

from pipelines.errors import UserError


@dataclass(frozen=True)
class Place:
    """Which rank this process is, as torchrun says."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls) -> Place:
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE.

        Raises:
            UserError: the process was not started by torchrun.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        missing = [name for name in names if name not in os.environ]
        if missing:
            raise UserError(
                "a rank does not know who it is",
                where="environment",
                got=f"no {', '.join(missing)}",
                fix="start it with `torchrun --nproc-per-node N -m pipelines.worker.main --run-dir DIR`",
            )
        return cls(*(int(os.environ[name]) for name in names))

"""Checkpoints of sharded models. Each rank writes its rows of all tensors to files, and rank 0 joins these files.

The joined files have the same format as the checkpoint of a model that is not sharded. Every reader of checkpoints can
therefore read the joined files. No rank has a whole tensor in memory, because rank 0 copies slices from file to file.
All ranks write to the run folder, which they share.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from pipelines.errors import UserError
from pipelines.formats.run_folder import RunFolder
from vlm.checkpoint import FORMAT, FORMAT_KEY, WEIGHTS
from vlm.files import atomic_write, join_rows, write_training_step
from vlm.training.state import STATE, TrainingSnapshot

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class CheckpointSlices:
    """The slices (parts) of the checkpoint of one step. Each rank writes one slice.

    Attributes:
        folder: folder of the slices, which is visible to all ranks.
        world_size: number of ranks.
        timeout_seconds: longest time that rank 0 waits for the slices of all other ranks, in seconds.
    """

    folder: Path
    world_size: int
    timeout_seconds: int

    def write(self, rank: int, snapshot: TrainingSnapshot) -> None:
        """Write the slice of a rank.

        Raises:
            OSError, SafetensorError: the slice cannot be written.
        """
        for name, tensors in ((WEIGHTS, snapshot.weights), (STATE, snapshot.state)):
            with atomic_write(self._path(rank, name)) as temporary:
                save_file(tensors, temporary)

    def join(self, folder: Path, step: int) -> None:
        """Wait for the slices of all ranks, join the slices into the files of a checkpoint, and remove the slices.

        Raises:
            UserError: a slice is missing after `timeout_seconds`.
            OSError, ValueError: the files of the checkpoint cannot be written.
        """
        self._wait()
        for name, metadata in ((WEIGHTS, {FORMAT_KEY: str(FORMAT)}), (STATE, {})):
            join_rows([self._path(rank, name) for rank in range(self.world_size)], folder / name, metadata)
        write_training_step(folder, step)
        shutil.rmtree(self.folder)

    def _path(self, rank: int, name: str) -> Path:
        return self.folder / f"rank-{rank}-{name}"

    def _wait(self) -> None:
        deadline = time.monotonic() + self.timeout_seconds
        # A rank writes its optimizer state after its weights, so a rank with a STATE file has written both files.
        while missing := [rank for rank in range(self.world_size) if not self._path(rank, STATE).exists()]:
            if time.monotonic() > deadline:
                raise UserError(
                    "a rank has not written its part of the checkpoint",
                    where=str(self.folder),
                    got=f"no files of rank {', '.join(map(str, missing))} after {self.timeout_seconds} s",
                    fix="make the same run folder visible to all ranks; if the storage is slow, raise "
                    "train.timeout_seconds",
                )
            time.sleep(POLL_SECONDS)


def slices_of(run: RunFolder, step: int) -> Path:
    """Return the folder of the slices of a step's checkpoint."""
    return run.checkpoints / f".slices_{step:06d}"


def remove_unfinished_checkpoints(run: RunFolder) -> None:
    """Remove the unfinished checkpoints that an earlier attempt of the run has left.

    After the removal, this attempt joins only its own slices. The temporary folder of a checkpoint may contain
    gigabytes.
    """
    for pattern in (".slices_*", ".step_*.tmp"):
        for folder in run.checkpoints.glob(pattern):
            shutil.rmtree(folder)

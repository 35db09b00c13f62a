"""A run's checkpoints: written by a thread while training goes on, kept a few, found again after a failure.

The training loop waits for two things alone: the copy of its tensors, and the writing of the checkpoint before, so at
most one copy lies in memory. What goes wrong in the thread is raised in the rank at its next step: a run that can write
no checkpoint is not a run that goes well.

Kept are the newest few, and the one whose step had the lowest `val/loss`. Which that is, the metric files say: nothing
is remembered, so a restart keeps the same ones.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from pipelines.errors import UserError
from pipelines.formats.run_folder import Metrics, RunDir, RunFile, read_json, step_of, write_json
from vlm.checkpoint import atomic_folder, verify_folder
from vlm.config import config_differences
from vlm.errors import CheckpointError

log = logging.getLogger(__name__)

NONE = -1
"""Instead of a step: there is no checkpoint."""


class CheckpointWriter:
    """Rank 0's: writes checkpoints one after another in a thread of its own."""

    def __init__(self, run: RunDir, file: RunFile) -> None:
        self._run, self._file, self._keep = run, file, file.config.train.keep_checkpoints
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Start writing the checkpoint of a step, when the one before is written.

        Args:
            step: steps taken.
            write: writes the files of a checkpoint into an empty folder.

        Raises:
            OSError, ...: the one before could not be written.
        """
        self.wait()
        self._pending = self._thread.submit(self._write, step, write)

    def check(self) -> None:
        """Look whether writing has failed, without waiting.

        Raises:
            OSError, ...: it has.
        """
        if self._pending and self._pending.done():
            self._pending.result()

    def wait(self) -> None:
        """Return when everything is written.

        Raises:
            OSError, ...: it could not be.
        """
        if self._pending:
            self._pending.result()

    def _write(self, step: int, write: Callable[[Path], None]) -> None:
        with atomic_folder(self._run.checkpoint(step)) as folder:
            write(folder)
            write_json(folder / "run.json", self._file)
        finished = self._run.finished_checkpoints()
        kept = {*finished[-self._keep :], best_checkpoint(self._run)}
        for folder in finished:
            if folder not in kept:
                shutil.rmtree(folder)


def best_checkpoint(run: RunDir) -> Path | None:
    """The checkpoint whose step was validated with the lowest loss; None where no step with a checkpoint was."""
    losses = {folder: loss for folder in run.finished_checkpoints() if (loss := _validated(run, folder)) is not None}
    return min(losses, key=losses.__getitem__) if losses else None


def _validated(run: RunDir, folder: Path) -> float | None:
    path = run.metrics(step_of(folder))
    return read_json(path, Metrics).values.get("val/loss") if path.exists() else None


def agree(run: RunDir, rank: int, device: torch.device) -> Path | None:
    """The checkpoint that all ranks go on from: the newest one that is whole, or None where there is none yet.

    Rank 0 compares every byte of it with what was written, and puts aside what is damaged.

    Raises:
        CheckpointError: there are checkpoints, and not one of them is whole.
        UserError: this rank does not see the checkpoint that rank 0 has found.
    """
    step = torch.tensor(NONE, device=device)
    if rank == 0 and (found := _newest_whole(run)):
        step.fill_(step_of(found))
    distributed.broadcast(step, src=0)
    if int(step) == NONE:
        return None
    folder = run.checkpoint(int(step))
    if not folder.is_dir():
        raise UserError(
            "a rank does not see the checkpoint that the others go on from",
            where=str(folder),
            got="no such folder on this host",
            fix="all ranks must see the same run folder; start the run again",
        )
    return folder


def _newest_whole(run: RunDir) -> Path | None:
    finished, problems = run.finished_checkpoints(), []
    for folder in reversed(finished):
        try:
            verify_folder(folder)
        except CheckpointError as error:
            log.warning("%s; it is put aside, and an earlier one is looked for", error)
            problems.append(f"{folder.name}: {error.got}")
            continue
        for damaged in finished[finished.index(folder) + 1 :]:
            run.put_aside(damaged)
        return folder
    if problems:
        raise CheckpointError(
            "no checkpoint of the run is whole",
            where=str(run.checkpoints),
            got="; ".join(problems),
            fix="copy one back from a backup, or remove that folder: then the run starts over",
        )
    return None


def refuse_other_science(folder: Path, file: RunFile) -> None:
    """Compare what a checkpoint was learned with to what the run is to go on with.

    Raises:
        UserError: they differ; lists all that does.
    """
    there = read_json(folder / "run.json", RunFile)
    differing = list(config_differences(_science(there), _science(file)))
    if differing:
        raise UserError(
            "the checkpoint was learned with other settings than the run has now",
            where=str(folder),
            got="; ".join(differing),
            fix="`lakesight train` gives other settings a folder of their own; put run.json back as it was",
        )


def _science(file: RunFile) -> dict[str, Any]:
    """What determines the outcome of a run. The weights it starts from matter to its first step alone."""
    train = file.config.train.science()
    train.pop("start_from")
    return {"model": file.config.model.model_dump(), "train": train, "shards": file.content_hash}

"""Functions that write checkpoints in a background thread, remove old checkpoints, and find the newest checkpoint.

The training loop waits only until its tensors are copied and until the previous checkpoint is written. Therefore at
most one copy of the tensors is in memory. An error in the thread is raised in the rank at its next step, because a run
that cannot write checkpoints must fail.

The newest `train.keep_checkpoints` checkpoints and the best checkpoint by `train.best_by` are kept. If `train.register`
is a step, the checkpoint of this step is kept too. The values of `train.best_by` are read from the metric files, so a
restarted run keeps the same checkpoints.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from pipelines.config import TrainConfig
from pipelines.config.train import BestBy
from pipelines.errors import UserError
from pipelines.formats.run_folder import Metrics, RunFile, RunFolder, read_json, step_of, write_json
from pipelines.worker.rank.metrics import FileWriter
from pipelines.worker.train.slices import remove_unfinished_checkpoints
from vlm.checkpoint import atomic_folder, verify_folder
from vlm.config import config_differences
from vlm.errors import CheckpointError
from vlm.files import read_training_step

log = logging.getLogger(__name__)

NO_CHECKPOINT = -1
"""If there is no checkpoint, rank 0 broadcasts this number instead of the step of a checkpoint."""
WRITE_SECONDS = 3600.0
"""Longest time, in seconds, during which a write that has not ended counts as progress of the rank.

A large checkpoint on slow storage takes longer than `train.timeout_seconds`, but a write may also hang."""
POLL_SECONDS = 0.5


class CheckpointWriter:
    """Writer that writes checkpoints in a background thread, one after another.

    Only rank 0 calls `save`. If the model is sharded, all other ranks call `start` to write their parts (slices) of
    the checkpoint.
    """

    def __init__(self, run: RunFolder, file: RunFile, files: FileWriter) -> None:
        self._run, self._file, self._keep = run, file, file.config.train.keep_checkpoints
        self._files = files
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._started = time.monotonic()

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Wait until the previous checkpoint is written, then start to write the checkpoint of this step.

        Args:
            step: number of training steps that the run has taken.
            write: function that writes the files of a checkpoint into an empty folder.

        Raises:
            OSError, ...: the previous checkpoint or a small file could not be written.
        """
        self.start(partial(self._write, step, write, self._files.last))

    def start(self, write: Callable[[], None]) -> None:
        """Wait until the previous function has finished, then call the function `write` in the background thread.

        Raises:
            OSError, ...: the previous function has raised this error, or a small file could not be written.
        """
        self.wait()
        self._pending, self._started = self._thread.submit(write), time.monotonic()

    def check(self) -> None:
        """Raise the error of a checkpoint or small file that could not be written. Do not wait for a write in progress.

        Raises:
            OSError, ...: a checkpoint or file could not be written.
        """
        self._files.check()
        if self._pending and self._pending.done():
            self._pending.result()

    def wait(self, report_progress: Callable[[], None] = lambda: None) -> None:
        """Wait until the last checkpoint and all small files are written.

        Args:
            report_progress: function that is called regularly while the checkpoint is written. The calls stop
                WRITE_SECONDS after the start of the write.

        Raises:
            OSError, ...: a checkpoint or file could not be written.
        """
        self._files.wait()
        if self._pending:
            while not wait_for([self._pending], POLL_SECONDS).done:
                if time.monotonic() - self._started < WRITE_SECONDS:
                    report_progress()
            self._pending.result()

    def _write(self, step: int, write: Callable[[Path], None], metrics: Future[None]) -> None:
        # The metrics are written first, because a restarted run reads the metrics of all steps up to its checkpoint.
        metrics.result()
        with atomic_folder(self._run.checkpoint(step)) as folder:
            write(folder)
            write_json(folder / "run.json", self._file)
        finished = self._run.finished_checkpoints()
        settings = self._file.config.train
        kept = {*finished[-self._keep :], best_checkpoint(self._run, settings.best_by)}
        if isinstance(settings.register_, int):
            kept.add(self._run.checkpoint(settings.register_))
        for folder in finished:
            if folder not in kept:
                shutil.rmtree(folder)


def best_checkpoint(run: RunFolder, best_by: BestBy) -> Path | None:
    """Return the best checkpoint by a metric, or None if no checkpoint has a value of the metric."""
    values = {
        folder: value
        for folder in run.finished_checkpoints()
        if (value := _metric_of(run, folder, best_by)) is not None
    }
    return min(values, key=lambda folder: cost(values[folder], best_by)) if values else None


def cost(value: float, best_by: BestBy) -> float:
    """Return the value of a metric, with the sign changed if a higher value is better."""
    return -value if best_by == "cider" else value


def _metric_of(run: RunFolder, folder: Path, best_by: BestBy) -> float | None:
    path = run.metrics(step_of(folder))
    return read_json(path, Metrics).values.get(f"val/{best_by}") if path.exists() else None


class MetricHistory:
    """Values of the metric `train.best_by` so far, which decide when training ends early and which step is the best.

    A resumed run reads the values of earlier steps from the metric files, and therefore makes the same decisions as an
    uninterrupted run. All ranks read the same files, so they make the same decisions. The files are read only if
    `train.stop` or `train.register: best` is set, because otherwise no decision depends on the values.
    """

    def __init__(self, run: RunFolder, settings: TrainConfig, resume_step: int) -> None:
        self._patience, self._best_by = settings.stop, settings.best_by
        self._saves_best = settings.saves_best
        self._costs: list[float] = []
        step = settings.next_validated_step(0)
        while (settings.stop or settings.saves_best) and step <= resume_step:
            if run.metrics(step).exists():  # a run that continues another run has no files of the first steps
                self.add(read_json(run.metrics(step), Metrics).values)
            step = settings.next_validated_step(step) if step < settings.steps else resume_step + 1

    def add(self, values: Mapping[str, float]) -> bool:
        """Add the metrics of a step. A step without a value of the metric `train.best_by` is ignored.

        Returns:
            Whether a checkpoint of the step must be written, because the value of the step is better than all earlier
            values. Always False in a run that does not save its best checkpoints (`TrainConfig.saves_best`).
        """
        if (value := values.get(f"val/{self._best_by}")) is None:
            return False
        self._costs.append(cost(value, self._best_by))
        return self._saves_best and all(self._costs[-1] < earlier for earlier in self._costs[:-1])

    @property
    def ends_training(self) -> bool:
        """True if the last `train.stop` values of the metric have not improved on the best earlier value.

        False if `train.stop` is not set.
        """
        if self._patience is None or not self._costs:
            return False
        return len(self._costs) - 1 - self._costs.index(min(self._costs)) >= self._patience


def find_common_checkpoint(run: RunFolder, rank: int, device: torch.device) -> Path | None:
    """Return the newest intact checkpoint, from which all ranks resume, or None if the run has no checkpoint yet.

    This function is a collective: every rank must call it. Rank 0 first removes the files of checkpoints that were
    never finished. Then rank 0 verifies the SHA-256 of the checkpoints' files, newest checkpoint first, until a
    checkpoint is intact. Rank 0 renames the damaged checkpoints that are newer than the intact checkpoint.

    Raises:
        CheckpointError: all checkpoints of the run are damaged.
        UserError: this rank cannot see the checkpoint that rank 0 has found.
    """
    step = torch.tensor(NO_CHECKPOINT, device=device)
    if rank == 0:
        remove_unfinished_checkpoints(run)
        if found := _newest_intact(run):
            step.fill_(step_of(found))
    distributed.broadcast(step, src=0)
    if int(step) == NO_CHECKPOINT:
        return None
    folder = run.checkpoint(int(step))
    if not folder.is_dir():
        raise UserError(
            "a rank cannot see the checkpoint that the other ranks resume from",
            where=str(folder),
            got="no such folder on this host",
            fix="make the same run folder visible to all ranks, then start the run again",
        )
    return folder


def _newest_intact(run: RunFolder) -> Path | None:
    finished, problems = run.finished_checkpoints(), []
    for folder in reversed(finished):
        try:
            verify_folder(folder)
        except CheckpointError as error:
            log.warning("%s An earlier checkpoint is tried, if there is one.", error)
            problems.append(f"{folder.name}: {error.got}")
            continue
        for damaged in finished[finished.index(folder) + 1 :]:
            run.mark_damaged(damaged)
        return folder
    if problems:
        raise CheckpointError(
            "no checkpoint of the run is intact",
            where=str(run.checkpoints),
            got=problems,
            fix="restore a checkpoint from a backup, or remove the folder of checkpoints to start from step 0",
        )
    return None


def find_training_state(checkpoint: Path | None, settings: TrainConfig) -> tuple[Path | None, int]:
    """Return the folder of the training state from which a run continues, and the number of the next step.

    Return None and step 0 if there is no such folder.

    Args:
        checkpoint: newest checkpoint of the run, or None if there is no checkpoint.
        settings: settings of the run. With `start_state: training`, a new run continues from the state in `start_from`.
    """
    if checkpoint:
        return checkpoint, step_of(checkpoint)
    if settings.start_state == "training":
        assert settings.start_from, "TrainConfig requires start_from if start_state is training"
        return Path(settings.start_from), read_training_step(Path(settings.start_from))
    return None, 0


def check_settings(folder: Path, file: RunFile) -> None:
    """Check that a checkpoint was trained with the settings and data that determine the outcome of the run.

    Raises:
        UserError: the checkpoint and the run differ in a setting or in the data. The error lists each difference.
    """
    saved = read_json(folder / "run.json", RunFile)
    differing = list(config_differences(_outcome_settings(saved), _outcome_settings(file)))
    if differing:
        raise UserError(
            "the settings of the run differ from the settings of its checkpoint",
            where=str(folder),
            got=differing,
            fix="restore these settings in run.json; for other settings, `lakesight train` creates a new folder",
        )


def _outcome_settings(file: RunFile) -> dict[str, Any]:
    """Return the settings and the data hash that determine the outcome of a run.

    `train.start_from` is left out, because it determines only the state from which the run starts.
    """
    train = file.config.train.science()
    train.pop("start_from")
    return {"model": file.config.model.hashed_settings(), "train": train, "shards": file.content_hash}

"""Replay of one training step, which computes the loss of each picture to find out why a loss is not finite.

A replay has its own run folder, which contains the run's last checkpoint before the step, if there is one. The ranks
train from this checkpoint in the same way as the original ranks, with the same rows and random numbers. Without a
checkpoint, the ranks train from the start of the run. Before the step, each rank computes and writes the loss of each
of its rows. After writing the losses, each rank takes the step, and validates if the original run validated after this
step.
"""

from __future__ import annotations

import math

import torch
from torch.distributed.fsdp import FSDPModule

from pipelines.formats.run_files.replay import ReplayedRow, ReplayedRows, ReplayRequest, replay_request, replayed_rows
from pipelines.formats.run_folder import RunFolder, read_json, write_json
from pipelines.worker.data.batches import rows_of_step
from pipelines.worker.rank.env import RankEnv
from pipelines.worker.rank.failure import RankMonitor
from pipelines.worker.train.run import train
from pipelines.worker.train.stages import Stage
from pipelines.worker.train.trainer import Trainer
from vlm.seeds import mix
from vlm.training.loop import mixed_precision
from vlm.training.objective import routed_layers, row_losses


def replay(run: RunFolder, env: RankEnv, monitor: RankMonitor) -> None:
    """Train from the checkpoint in the run folder of a replay, and stop after the step that replay.json names.

    Raises:
        NotFiniteError: the loss of a step or of a validation is not finite.
    """
    train(run, env, monitor, Replayer)


class Replayer(Trainer):
    """Trainer that stops after the replayed step. Before the replayed step, the trainer writes the loss of each row."""

    def write_result(self) -> None:
        """Do not write result.json, because the run is not finished."""

    def _train_stage(self, stage: Stage, steps: range) -> None:
        step = read_json(replay_request(self.run), ReplayRequest).step
        if before := range(steps.start, min(steps.stop, step)):
            super()._train_stage(stage, before)
        if step in steps:
            self._write_rows(step)
            super()._train_stage(stage, range(step, step + 1))

    def _write_rows(self, step: int) -> None:
        """Compute and write the loss of each row of this rank, with the same dropout as in the step.

        This method is a collective: every rank must call it.
        """
        settings = self.file.config.train
        rows, texts, picks = rows_of_step(self.train_shards, step, **self.row_order())
        shown = self.augmenter.rows(rows, texts, picks) if self.augmenter else rows
        size = settings.rows_at_once or len(rows)
        found: list[ReplayedRow] = []
        self.model.train()
        torch.manual_seed(mix(settings.seed, step, self.env.rank))
        for first in range(0, len(rows), size):
            part = slice(first, first + size)
            batch = self.collator.collate(shown[part], texts[part]).to(self.device)
            with mixed_precision(self.device, bf16=settings.precision == "bf16"):
                losses_B, tokens_B = row_losses(self.model, batch)
            for layer in routed_layers(self.model).values():
                layer.pop_routing()
            for row, (_, text), loss, tokens in zip(
                rows[part], texts[part], losses_B.tolist(), tokens_B.tolist(), strict=True
            ):
                mean = loss / tokens if tokens else math.nan
                finite = mean if math.isfinite(mean) else None
                found.append(ReplayedRow(image_id=row.image_id, text=text, tokens=tokens, loss=finite))
            self.monitor.report_progress()
        if isinstance(self.model, FSDPModule):
            self.model.reshard()
        write_json(replayed_rows(self.run, self.env.rank), ReplayedRows(rank=self.env.rank, rows=tuple(found)))

"""Replay of one training step: the loss of each picture of the step, to find out why a loss is not finite.

A replay runs in a run folder of its own, which has a checkpoint from before the step. The ranks train from this
checkpoint as the original ranks did, with the same rows and random numbers. At the step, each rank first computes and
writes the loss of each of its rows, then takes the step, and validates if the step is followed by a validation.
"""

from __future__ import annotations

import math

import torch
from torch.distributed.fsdp import FSDPModule

from pipelines.formats.replay import ReplayedRow, ReplayedRows, ReplayRequest, replay_request, replayed_rows
from pipelines.formats.run_folder import RunFolder, read_json, write_json
from pipelines.worker.data.batches import rows_of_step
from pipelines.worker.rank.env import RankEnv
from pipelines.worker.rank.failure import RankMonitor
from pipelines.worker.train.stages import Stage
from pipelines.worker.train.trainer import Trainer, train
from vlm.seeds import mix
from vlm.training.loop import mixed_precision
from vlm.training.objective import routed_layers, row_losses


def replay(run: RunFolder, env: RankEnv, monitor: RankMonitor) -> None:
    """Train from the checkpoint of a replay folder to the step that replay.json names, and stop after the step.

    Raises:
        NotFiniteError: the loss of the step, or of the validation after the step, is not finite.
    """
    train(run, env, monitor, Replayer)


class Replayer(Trainer):
    """Trainer that stops after one step, and writes the loss of each row before this step."""

    def write_result(self) -> None:
        """Write no result, because the run is not finished."""

    def _train_stage(self, stage: Stage, steps: range) -> None:
        step = read_json(replay_request(self.run), ReplayRequest).step
        if before := range(steps.start, min(steps.stop, step)):
            super()._train_stage(stage, before)
        if step in steps:
            self._write_rows(step)
            super()._train_stage(stage, range(step, step + 1))

    def _write_rows(self, step: int) -> None:
        """Write the loss of each row of this rank, with the dropout of the step. All ranks call this together."""
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

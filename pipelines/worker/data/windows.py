"""Windows of a token file, which are the training samples of a text-only model.

A window has as many input tokens as the model has positions, and may span several texts, as in GPT-2. The positions at
which windows begin in the token file depend on (seed, epoch), so that epochs differ. The windows of a step are picked
like the rows of shards (`order.py`), so a run resumes at any step without stored state.

Letters in tensor names: windows (B), positions (T).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipelines.formats.run_files.token_file import Ids
from pipelines.worker.data.batches import map_ahead
from pipelines.worker.data.order import hash64, pick_rows
from vlm.batch import IGNORE, Batch
from vlm.text.base import Tokenizer


class Windows(NamedTuple):
    """Tokens of a token file, and the settings by which the tokens are cut into windows.

    Attributes:
        ids: all tokens.
        context: number of positions of a window.
        bos_id: start token, which no position predicts.
        pad_id: token that fills the positions after the last token.
    """

    ids: Ids
    context: int
    bos_id: int
    pad_id: int

    @classmethod
    def of(cls, ids: Ids, context: int, tokenizer: Tokenizer) -> Windows:
        """Cut tokens into windows for a model and its tokenizer."""
        return cls(ids, context, tokenizer.bos_id, tokenizer.pad_id)

    @property
    def per_epoch(self) -> int:
        """Number of windows in a training epoch, at least 1.

        The tokens that are left over in an epoch are too few for another window.
        """
        return max(1, len(self.ids) // self.context)

    def training_batch(self, rows: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64], seed: int) -> Batch:
        """Return training windows, whose first positions depend on their epoch.

        A window that reaches the end of the token sequence continues at the start of the sequence.
        """
        shifts = np.array([hash64(seed, int(epoch)) % self.context for epoch in epochs])
        starts = rows * self.context + shifts
        positions_BT = (starts[:, None] + np.arange(self.context + 1)) % len(self.ids)
        return self._batch(self.ids[positions_BT].astype(np.int64), np.ones_like(positions_BT, bool))

    def held_out_batch(self, numbers: npt.NDArray[np.int64]) -> Batch:
        """Return validation windows, which begin at multiples of `context`.

        The last window is padded to full length.
        """
        positions_BT = numbers[:, None] * self.context + np.arange(self.context + 1)
        inside_BT = positions_BT < len(self.ids)
        ids_BT = self.ids[np.minimum(positions_BT, len(self.ids) - 1)].astype(np.int64)
        return self._batch(np.where(inside_BT, ids_BT, self.pad_id), inside_BT)

    def _batch(self, ids_BT: npt.NDArray[np.int64], inside_BT: npt.NDArray[np.bool_]) -> Batch:
        targets_BT = ids_BT[:, 1:]
        labels_BT = np.where(inside_BT[:, 1:] & (targets_BT != self.bos_id), targets_BT, IGNORE)
        return Batch(
            pixels_PHWC=torch.empty((0, 1, 1, 3), dtype=torch.uint8),
            tokens_BT=torch.from_numpy(np.ascontiguousarray(ids_BT[:, :-1])),
            labels_BT=torch.from_numpy(labels_BT),
            prefix_lengths_B=torch.ones(len(ids_BT), dtype=torch.int64),
        )


def training_windows(
    windows: Windows,
    *,
    steps: range,
    rank: int,
    world_size: int,
    batch_size: int,
    seed: int,
    rows_at_once: int | None = None,
    workers: int = 0,
    pinned: bool = False,
) -> Iterator[list[Batch]]:
    """Yield this rank's windows of each step, as a list of smaller batches.

    The arguments after `windows` have the same meaning as in `batches.training_batches`.
    """

    def make(step: int) -> list[Batch]:
        picks = pick_rows(
            step,
            rank=rank,
            world_size=world_size,
            batch_size=batch_size,
            num_rows=windows.per_epoch,
            seed=seed,
        )
        at_once = rows_at_once or len(picks.rows)
        parts = [
            windows.training_batch(picks.rows[at : at + at_once], picks.epochs[at : at + at_once], seed)
            for at in range(0, len(picks.rows), at_once)
        ]
        return [part.pin_memory() for part in parts] if pinned else parts

    return map_ahead(make, steps, workers)

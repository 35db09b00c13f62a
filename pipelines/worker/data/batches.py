"""Training batches: rows of the shards as tensors, loaded a few batches ahead of the training loop.

    SLOT x N     <bos>  prompt \\n  answer  <eos>
    '----------- prefix ----------' '-- targets --'

SLOT x N stands for the N positions that the picture takes in the token sequence. The input tokens of a row are the
row's token sequence without the last token. The labels of a row are the row's token sequence without the first token,
and labels inside the prefix are IGNORE.

Letters in tensor names: rows (B), pictures (P), height (H), width (W), channels (C), positions (T).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import NamedTuple, TypedDict, TypeVar

import numpy as np
import torch

from pipelines.formats.shards import Row, Shards
from pipelines.worker.data.augment import Augmenter
from pipelines.worker.data.order import RowPicks, pick_mix_rows, pick_rows, random_bits
from vlm.batch import IGNORE, Batch
from vlm.config import ModelConfig
from vlm.text.base import Tokenizer
from vlm.text.prompt import answer_ids, prefix_ids

log = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")

PAD_MULTIPLE = 8
"""Sequence lengths are rounded up to a multiple of this number, but at most to the context of the model. Batches then
have fewer distinct shapes, and kernels are faster."""


class TokenSequence(NamedTuple):
    """Token ids of the prefix and the answer, and the number of tokens in the prefix."""

    ids: list[int]
    prefix: int


class RowOrder(TypedDict):
    """Arguments of `training_batches` that determine which rows a rank reads at a step."""

    rank: int
    world_size: int
    batch_size: int
    seed: int


class Collator:
    """Collator that makes batches for one model from rows, and counts texts that are truncated to the context."""

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig) -> None:
        self.num_truncated = 0
        self._count_lock = threading.Lock()
        self._tokenizer, self._num_slots, self._context = tokenizer, config.num_slots, config.decoder.context

    def collate(self, rows: Sequence[Row], texts: Sequence[tuple[str, str]]) -> Batch:
        """Collate rows into one batch, in which all token sequences are padded to the same length.

        Args:
            rows: B rows of the shards.
            texts: pair (prompt, text) to train on, for each row.
        """
        (batch,) = self.collate_parts(rows, texts, len(rows))
        return batch

    def collate_parts(self, rows: Sequence[Row], texts: Sequence[tuple[str, str]], rows_at_once: int) -> list[Batch]:
        """Collate rows into smaller batches (parts) of at most `rows_at_once` rows.

        In each smaller batch, all rows are padded to the same length. Rows are sorted by length to reduce padding. If
        all rows fit into one batch, the rows keep their order.
        """
        made = [(row, self._sequence(row.image_id, *text)) for row, text in zip(rows, texts, strict=True)]
        if len(made) > rows_at_once:
            made.sort(key=lambda each: len(each[1].ids))
        parts = [made[first : first + rows_at_once] for first in range(0, len(made), rows_at_once)]
        return [self._padded([row for row, _ in part], [sequence for _, sequence in part]) for part in parts]

    def collate_samples(
        self, rows: Sequence[Row], sequences: Sequence[TokenSequence], weights: Sequence[float]
    ) -> Batch:
        """Collate pictures and their sampled answers into one batch, with a loss weight for each answer.

        Args:
            rows: P rows of the shards.
            sequences: token sequences of all answers, in the order of the rows, with equally many answers per row.
            weights: weight of each token sequence in the loss.
        """
        batch = self._padded(rows, sequences)
        return replace(batch, weights_B=torch.tensor(weights), rows_per_picture=len(sequences) // len(rows))

    def _padded(self, rows: Sequence[Row], sequences: Sequence[TokenSequence]) -> Batch:
        """Pad the sequences to the same length, and make one batch from the sequences and the pictures of the rows."""
        longest = max(len(sequence.ids) for sequence in sequences) - 1
        length = min(self._context, -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE)
        tokens_BT = np.full((len(sequences), length), self._tokenizer.pad_id, np.int64)
        labels_BT = np.full((len(sequences), length), IGNORE, np.int64)
        for b, (ids, prefix) in enumerate(sequences):
            tokens_BT[b, : len(ids) - 1] = ids[:-1]
            labels_BT[b, prefix - 1 : len(ids) - 1] = ids[prefix:]
        return Batch(
            pixels_PHWC=torch.from_numpy(np.stack([row.pixels for row in rows])),
            tokens_BT=torch.from_numpy(tokens_BT),
            labels_BT=torch.from_numpy(labels_BT),
            prefix_lengths_B=torch.tensor([prefix for _, prefix in sequences]),
        )

    def _sequence(self, image_id: str, prompt: str, text: str) -> TokenSequence:
        """Return the token sequence of one sample, truncated to the context.

        A truncated sequence has no end token. If the prefix is longer than the context, the prefix is cut so that there
        is room for one target token.
        """
        prefix = prefix_ids(self._tokenizer, self._num_slots, prompt)
        sequence = prefix[: self._context] + answer_ids(self._tokenizer, text)
        if len(prefix) > self._context or len(sequence) > self._context + 1:
            with self._count_lock:
                self.num_truncated += 1
            if self.num_truncated == 1:
                log.warning(
                    "the text of picture %s is longer than the context and is truncated (only the first is logged)",
                    image_id,
                )
        return TokenSequence(sequence[: self._context + 1], min(len(prefix), self._context))


def training_batches(
    shards: Shards,
    collator: Collator,
    *,
    steps: range,
    rank: int,
    world_size: int,
    batch_size: int,
    seed: int,
    rows_at_once: int | None = None,
    workers: int = 0,
    augmenter: Augmenter | None = None,
    pinned: bool = False,
) -> Iterator[list[Batch]]:
    """For each step, yield this rank's share of the global batch, as a list of smaller batches (parts).

    The batches do not depend on the number of loader threads. A picture with several texts is shown with one text per
    epoch. The choice of the text depends on (seed, epoch, row). With 0 `workers`, each batch is made when the training
    loop requests the batch.

    Args:
        shards: training shards.
        collator: collator that makes the model's batches.
        steps: numbers of the training steps for which batches are made.
        rank: number of this rank, 0 <= rank < world_size.
        world_size: number of ranks, a divisor of `batch_size`.
        batch_size: number of rows per step over all ranks together.
        seed: seed of the run.
        rows_at_once: number of rows in each smaller batch, or None for one batch with all rows of the rank.
        workers: number of loader threads.
        augmenter: augmenter of the pictures, or None to use the pixels of the shards unchanged.
        pinned: whether to place batches in pinned memory, from which a GPU copies asynchronously.
    """

    def make(step: int) -> list[Batch]:
        rows, texts, picks = rows_of_step(
            shards, step, rank=rank, world_size=world_size, batch_size=batch_size, seed=seed
        )
        shown = augmenter.rows(rows, texts, picks) if augmenter else rows
        made = collator.collate_parts(shown, texts, rows_at_once or len(rows))
        return [part.pin_memory() for part in made] if pinned else made

    return map_ahead(make, steps, workers)


def rows_of_step(
    shards: Shards, step: int, *, rank: int, world_size: int, batch_size: int, seed: int
) -> tuple[list[Row], list[tuple[str, str]], RowPicks]:
    """Return the rows of this rank at a step, the (prompt, text) pair of each row, and the RowPicks.

    `training_batches` explains the arguments. The pictures of the rows are not augmented.
    """
    parts = shards.manifest.parts
    sizes, draws = [part.rows for part in parts], [part.draws for part in parts]
    num_rows = sum(draws) or len(shards)
    picks = pick_rows(step, rank=rank, world_size=world_size, batch_size=batch_size, num_rows=num_rows, seed=seed)
    if parts:
        picks = pick_mix_rows(picks, sizes, draws, seed=seed)
    rows = [shards.row(int(index)) for index in picks.rows]
    numbers = random_bits(picks, seed=seed).tolist()
    drawn = [shards.drawn_texts(row.texts) for row in rows]
    texts = [choices[number % len(choices)] for choices, number in zip(drawn, numbers, strict=True)]
    return rows, texts, picks


def map_ahead(make: Callable[[S], T], items: Iterable[S], workers: int) -> Iterator[T]:
    """Apply `make` to items in threads, a few items ahead of the consumer, and yield the results in item order.

    If `make` raises an error for an item, the error is raised when the consumer requests the result of the item.
    Threads are used instead of processes, because JPEG decoding releases the GIL, and because threads return results
    without a copy. Several calls of `make` may run at the same time, but the results have the order of the items. With
    0 `workers`, `make` is called for an item when the consumer requests its result.

    Args:
        make: pure function that makes the result of one item.
        items: arguments for `make`.
        workers: number of threads.
    """
    if not workers:
        yield from map(make, items)
        return
    remaining = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="loader") as threads:
        pending = deque(threads.submit(make, item) for item in islice(remaining, workers + 1))
        try:
            while pending:
                made = pending.popleft().result()
                pending.extend(threads.submit(make, item) for item in islice(remaining, 1))
                yield made
        finally:
            for future in pending:
                future.cancel()

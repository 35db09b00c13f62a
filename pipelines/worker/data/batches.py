"""From rows of the shards to tensors, a few batches ahead of the training loop.

    SLOT x N     <bos>  prompt \\n  answer  <eos>      tokens are all but the last, labels all but the first;
    '----------- prefix ----------' '-- targets --'   a label inside the prefix is IGNORE

Letters: B batch, H W pixels, T positions.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np
import torch

from pipelines.formats.shards import Row, Shards
from pipelines.worker.data.augment import Augmenter
from pipelines.worker.data.order import bits, draw, mixed
from vlm.batch import IGNORE, Batch
from vlm.config import ModelConfig
from vlm.text.base import Tokenizer
from vlm.text.prompt import answer_ids, prefix_ids

log = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")

PAD_MULTIPLE = 8
"""Lengths are rounded up to it: fewer shapes, and kernels like it."""


class Collator:
    """Makes batches for one model; counts the texts that did not fit its context."""

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig) -> None:
        self.cut = 0
        self._counting = threading.Lock()
        self._tokenizer, self._num_slots, self._context = tokenizer, config.num_slots, config.decoder.context

    def batch(self, rows: Sequence[Row], texts: Sequence[tuple[str, str]]) -> Batch:
        """Rows and the (prompt, text) to learn of each, as tensors padded to the longest."""
        (batch,) = self.parts(rows, texts, len(rows))
        return batch

    def parts(self, rows: Sequence[Row], texts: Sequence[tuple[str, str]], rows_at_once: int) -> list[Batch]:
        """The same in parts of so many rows, the last one shorter, each padded to its own longest.

        Rows of like length come together, so that little is padded; where there is one part they keep their order.
        """
        made = [(row, *self._sequence(row.image_id, *text)) for row, text in zip(rows, texts, strict=True)]
        if len(made) > rows_at_once:
            made.sort(key=lambda each: len(each[1]))
        return [self._padded(made[first : first + rows_at_once]) for first in range(0, len(made), rows_at_once)]

    def _padded(self, made: Sequence[tuple[Row, list[int], int]]) -> Batch:
        """Rows with their sequences and the lengths of their prefixes."""
        longest = max(len(sequence) for _, sequence, _ in made) - 1
        length = min(self._context, -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE)
        tokens_BT = np.full((len(made), length), self._tokenizer.pad_id, np.int64)
        labels_BT = np.full((len(made), length), IGNORE, np.int64)
        for b, (_, sequence, prefix) in enumerate(made):
            tokens_BT[b, : len(sequence) - 1] = sequence[:-1]
            labels_BT[b, prefix - 1 : len(sequence) - 1] = sequence[prefix:]
        return Batch(
            pixels_PHWC=torch.from_numpy(np.stack([row.pixels for row, _, _ in made])),
            tokens_BT=torch.from_numpy(tokens_BT),
            labels_BT=torch.from_numpy(labels_BT),
            prefix_lengths_B=torch.tensor([prefix for _, _, prefix in made]),
        )

    def _sequence(self, image_id: str, prompt: str, text: str) -> tuple[list[int], int]:
        """Ids of one sample and the length of its prefix, cut to the context (then without an end token).

        At least one target is kept: of a prompt that fills the context, the beginning.
        """
        prefix = prefix_ids(self._tokenizer, self._num_slots, prompt)
        sequence = prefix[: self._context] + answer_ids(self._tokenizer, text)
        if len(prefix) > self._context or len(sequence) > self._context + 1:
            with self._counting:
                self.cut += 1
            if self.cut == 1:
                log.warning("%s: its text does not fit the context and is cut (said once, counted)", image_id)
        return sequence[: self._context + 1], min(len(prefix), self._context)


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
    """This rank's slice of the global batch of each step, in parts; the same whatever the number of workers.

    Parts have `rows_at_once` rows; without it there is one. A picture with several texts shows one of them an epoch,
    picked by (seed, epoch, row). Pictures are those of the shards, byte for byte, or what an augmenter makes of them.
    `pinned`: in memory that a GPU copies from by itself.
    """
    parts = shards.manifest.parts
    sizes, draws = [part.rows for part in parts], [part.draws for part in parts]
    num_rows = sum(draws) or len(shards)

    def make(step: int) -> list[Batch]:
        drawn = draw(step, rank=rank, world_size=world_size, batch_size=batch_size, num_rows=num_rows, seed=seed)
        if parts:
            drawn = mixed(drawn, sizes, draws, seed=seed)
        rows = [shards.row(int(index)) for index in drawn.rows]
        texts = [
            row.texts[pick % len(row.texts)] for row, pick in zip(rows, bits(drawn, seed=seed).tolist(), strict=True)
        ]
        shown = augmenter.rows(rows, texts, drawn) if augmenter else rows
        made = collator.parts(shown, texts, rows_at_once or len(rows))
        return [part.pin_memory() for part in made] if pinned else made

    return ahead(make, steps, workers)


def ahead(make: Callable[[S], T], items: Iterable[S], workers: int) -> Iterator[T]:
    """What `make` makes of each item, in order, made by threads a few items ahead; its errors are raised here.

    Threads, not processes: a raw row is a view of a mapped file, decoding JPEG lets go of the interpreter, and a thread
    hands its batch over without a copy.

    Args:
        make: a pure function; called in any order.
        items: in order.
        workers: threads; each makes whole items. 0: each is made when it is asked for.
    """
    if not workers:
        yield from map(make, items)
        return
    left = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="loader") as threads:
        pending = deque(threads.submit(make, item) for item in islice(left, workers + 1))
        try:
            while pending:
                made = pending.popleft().result()
                pending.extend(threads.submit(make, item) for item in islice(left, 1))
                yield made
        finally:
            for future in pending:
                future.cancel()

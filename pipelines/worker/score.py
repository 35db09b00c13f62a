"""What a model makes of a range of shard rows: its caption, and the loss with the right picture and with wrong ones.

Wrong pictures are three. That of another row: row (i + n // 2) mod n for row i, never its own, the same on every
machine, and with shuffled shards as good as drawn by chance. A grey one. And noise, drawn by the number of the row.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipelines.formats.shards import Row, Shards
from pipelines.worker.data.batches import Collator
from vlm.captioner import Captioner
from vlm.errors import UserError
from vlm.generation.generate import Completion
from vlm.image import pixel_stats
from vlm.training.objective import row_scores

BATCH_ROWS = 32
GREY = 128


class Item(NamedTuple):
    """A picture and one of its prompts."""

    number: int
    row: Row
    prompt: str
    references: list[str]


@dataclass(frozen=True)
class RowScore:
    """One picture and prompt; losses are sums over the `num_targets` tokens of all references, in nats.

    `blind_loss` is None where the split has no other picture, `caption` where the prompt leaves no room for one.
    `num_correct` counts the target tokens that the model holds likeliest; `seconds` is the row's share of the time its
    batch took to caption. `mean_logprob` is of the caption's tokens; brightness and contrast are the picture's.
    """

    row: int
    image_id: str
    prompt: str
    references: list[str]
    caption: str | None
    loss: float
    blind_loss: float | None
    blank_loss: float
    noise_loss: float
    num_targets: int
    num_correct: int
    num_tokens: int
    seconds: float
    mean_logprob: float | None
    brightness: float
    contrast: float


class _Losses(NamedTuple):
    """Sums over the references of each item."""

    losses: list[float]
    targets: list[int]
    correct: list[int]


def score_rows(captioner: Captioner, shards: Shards, indexes: Sequence[int]) -> Iterator[RowScore]:
    """Scores of rows by index, one for each picture and distinct prompt, in order."""
    collator = Collator(captioner.tokenizer, captioner.model.config)
    for start in range(0, len(indexes), BATCH_ROWS):
        items = [
            Item(index, row, prompt, references)
            for index in indexes[start : start + BATCH_ROWS]
            for row in [shards.row(index)]
            for prompt, references in _by_prompt(row).items()
        ]
        started = time.perf_counter()
        captions = _captions(captioner, items)
        seconds = (time.perf_counter() - started) / len(items)
        right = _losses(captioner, collator, items, [item.row for item in items])
        grey = [_painted(item.row, np.full_like(item.row.pixels, GREY)) for item in items]
        noise = [_painted(item.row, _noise(item)) for item in items]
        blank = _losses(captioner, collator, items, grey).losses
        noisy = _losses(captioner, collator, items, noise).losses
        blind: Sequence[float | None] = [None] * len(items)
        if len(shards) > 1:
            others = [shards.row((item.number + len(shards) // 2) % len(shards)) for item in items]
            blind = _losses(captioner, collator, items, others).losses
        for place, item in enumerate(items):
            made = captions[place]
            light = pixel_stats(item.row.pixels)
            yield RowScore(
                row=item.number,
                image_id=item.row.image_id,
                prompt=item.prompt,
                references=item.references,
                caption=made.text if made else None,
                loss=right.losses[place],
                blind_loss=blind[place],
                blank_loss=blank[place],
                noise_loss=noisy[place],
                num_targets=right.targets[place],
                num_correct=right.correct[place],
                num_tokens=made.num_tokens if made else 0,
                seconds=seconds,
                mean_logprob=made.mean_logprob if made else None,
                brightness=light.brightness,
                contrast=light.contrast,
            )


def _by_prompt(row: Row) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = defaultdict(list)
    for prompt, text in row.texts:
        grouped[prompt].append(text)
    return grouped


def _painted(row: Row, pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Row:
    return row._replace(pixels=pixels)


def _noise(item: Item) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(item.number).integers(0, 256, item.row.pixels.shape, np.uint8)


def _captions(captioner: Captioner, items: Sequence[Item]) -> list[Completion | None]:
    """Captions by the model's own settings without chance; None where the prompt leaves no room."""
    settings = captioner.model.config.generation.model_copy(update={"temperature": 0.0})
    answers = captioner.complete([item.row.pixels for item in items], [item.prompt for item in items], settings)
    return [None if isinstance(answer, UserError) else answer for answer in answers]


def _losses(captioner: Captioner, collator: Collator, items: Sequence[Item], pictures: Sequence[Row]) -> _Losses:
    """Losses of the items, given the picture at the same place."""
    found = _Losses([0.0] * len(items), [0] * len(items), [0] * len(items))
    flat = [(place, item.prompt, text) for place, item in enumerate(items) for text in item.references]
    for start in range(0, len(flat), BATCH_ROWS):
        chunk = flat[start : start + BATCH_ROWS]
        batch = collator.batch(
            [pictures[place] for place, _, _ in chunk], [(prompt, text) for _, prompt, text in chunk]
        )
        sums = row_scores(captioner.model, batch.to(captioner.model.mean.device))
        for (place, _, _), loss, targets, correct in zip(chunk, *(values_B.tolist() for values_B in sums), strict=True):
            found.losses[place] += loss
            found.targets[place] += targets
            found.correct[place] += correct
    return found

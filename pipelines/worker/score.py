"""Scores of a model on shard rows: the caption, the loss with the right picture, and losses with three wrong pictures.

The first wrong picture of row i of n rows is the picture of row (i + n // 2) mod n. Shards are shuffled, so the first
wrong picture is a random picture, which is the same on every host. Shards with only one row have no first wrong
picture. The second wrong picture is grey. The third wrong picture is random noise, whose seed is the index of the row.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pipelines.formats.row_scores import RowScore
from pipelines.formats.shards import Row, Shards
from pipelines.worker.data.batches import Collator
from vlm.captioner import Captioner
from vlm.config import GenerationConfig
from vlm.errors import UserError
from vlm.generation.finite import require_finite
from vlm.generation.generate import Completion
from vlm.image import pixel_stats
from vlm.text.words import words
from vlm.training.objective import row_scores

BATCH_ROWS = 32
GREY = 128


class Item(NamedTuple):
    """A picture, one of its prompts, all reference texts for this prompt, and the texts whose losses are added."""

    row_index: int
    row: Row
    prompt: str
    references: list[str]
    drawn: list[str]


class _Losses(NamedTuple):
    """Loss, number of targets and number of correct targets of each item, each summed over the texts of the item."""

    losses: list[float]
    targets: list[int]
    correct: list[int]


def score_rows(
    captioner: Captioner, shards: Shards, indexes: Sequence[int], settings: GenerationConfig
) -> Iterator[RowScore]:
    """Score the rows with the given indices, in the given order. Yield one score per picture and distinct prompt.

    The generation settings affect only the captions, not the losses.
    """
    collator = Collator(captioner.tokenizer, captioner.model.config)
    for start in range(0, len(indexes), BATCH_ROWS):
        items = [
            Item(index, row, prompt, references, drawn[prompt])
            for index in indexes[start : start + BATCH_ROWS]
            for row in [shards.row(index)]
            for drawn in [_by_prompt(shards.drawn_texts(row.texts))]
            for prompt, references in _by_prompt(row.texts).items()
        ]
        started = time.perf_counter()
        captions = _caption(captioner, items, settings)
        seconds = (time.perf_counter() - started) / len(items)
        right = _losses(captioner, collator, items, [item.row for item in items])
        grey = [_replace_pixels(item.row, np.full_like(item.row.pixels, GREY)) for item in items]
        noise = [_replace_pixels(item.row, _noise(item)) for item in items]
        blank = _losses(captioner, collator, items, grey).losses
        noisy = _losses(captioner, collator, items, noise).losses
        blind: Sequence[float | None] = [None] * len(items)
        if len(shards) > 1:
            others = [shards.row((item.row_index + len(shards) // 2) % len(shards)) for item in items]
            blind = _losses(captioner, collator, items, others).losses
        for number, item in enumerate(items):
            generated = captions[number]
            light = pixel_stats(item.row.pixels)
            yield RowScore(
                row=item.row_index,
                image_id=item.row.image_id,
                prompt=item.prompt,
                references=tuple(item.references),
                caption=generated.text if generated else None,
                loss=right.losses[number],
                blind_loss=blind[number],
                blank_loss=blank[number],
                noise_loss=noisy[number],
                num_targets=right.targets[number],
                num_correct=right.correct[number],
                num_tokens=generated.num_tokens if generated else 0,
                seconds=seconds,
                mean_logprob=generated.mean_logprob if generated else None,
                brightness=light.brightness,
                contrast=light.contrast,
                num_texts=len(item.drawn),
            )


def validation_cider(captioner: Captioner, shards: Shards, num_rows: int) -> float:
    """Caption the first rows of the shards at temperature 0, and return the CIDEr-D of the captions.

    Return 0 if no prompt leaves room for a caption. All generation settings except the temperature are taken from the
    model.

    Args:
        captioner: captioner, whose model must be in evaluation mode.
        shards: validation shards.
        num_rows: largest number of rows to caption.
    """
    from pycocoevalcap.cider.cider import Cider  # imported here, because only runs with train.score_every need it

    settings = captioner.settings(temperature=0.0)
    truth: dict[int, list[str]] = {}
    found: dict[int, list[str]] = {}
    for start in range(0, min(num_rows, len(shards)), BATCH_ROWS):
        rows = [shards.row(index) for index in range(start, min(start + BATCH_ROWS, num_rows, len(shards)))]
        items = [Item(0, row, prompt, texts, []) for row in rows for prompt, texts in _by_prompt(row.texts).items()]
        for item, answer in zip(items, _caption(captioner, items, settings), strict=True):
            if answer is not None:
                truth[len(truth)] = [" ".join(words(reference)) for reference in item.references]
                found[len(found)] = [" ".join(words(answer.text))]
    return float(Cider().compute_score(truth, found)[0]) if found else 0.0


def _by_prompt(texts: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = defaultdict(list)
    for prompt, text in texts:
        grouped[prompt].append(text)
    return grouped


def _replace_pixels(row: Row, pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Row:
    return row._replace(pixels=pixels)


def _noise(item: Item) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(item.row_index).integers(0, 256, item.row.pixels.shape, np.uint8)


def _caption(captioner: Captioner, items: Sequence[Item], settings: GenerationConfig) -> list[Completion | None]:
    """Caption items. The result for an item is None if the item's prompt leaves no room for a caption."""
    answers = captioner.complete([item.row.pixels for item in items], [item.prompt for item in items], settings)
    return [None if isinstance(answer, UserError) else answer for answer in answers]


def _losses(captioner: Captioner, collator: Collator, items: Sequence[Item], pictures: Sequence[Row]) -> _Losses:
    """Compute the losses of the items when the model sees the pixels of pictures[i] for item i.

    Raises:
        UserError: the model computes NaN.
    """
    found = _Losses([0.0] * len(items), [0] * len(items), [0] * len(items))
    flat = [(number, item.prompt, text) for number, item in enumerate(items) for text in item.drawn]
    for start in range(0, len(flat), BATCH_ROWS):
        chunk = flat[start : start + BATCH_ROWS]
        batch = collator.collate(
            [pictures[number] for number, _, _ in chunk], [(prompt, text) for _, prompt, text in chunk]
        )
        sums = row_scores(captioner.model, batch.to(captioner.model.mean.device))
        for (number, _, _), loss, targets, correct in zip(
            chunk, *(values_B.tolist() for values_B in sums), strict=True
        ):
            require_finite(captioner.model, [loss])
            found.losses[number] += loss
            found.targets[number] += targets
            found.correct[number] += correct
    return found

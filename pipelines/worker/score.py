"""What a model makes of a range of shard rows: its caption, and the loss with the right picture and with another one.

The other picture of row i is that of row (i + n // 2) mod n: never its own, the same on every machine, and with
shuffled shards as good as drawn by chance.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipelines.shards import Row, Shards
from pipelines.worker.batches import Collator
from pipelines.worker.caption import Captioner
from vlm.errors import UserError
from vlm.objective import row_losses

BATCH_ROWS = 32

Item = tuple[int, Row, str, list[str]]
"""Row number, row, prompt, references."""


@dataclass(frozen=True)
class RowScore:
    """One picture and prompt; losses are sums over the `num_targets` tokens of all references, in nats.

    `blind_loss` is None where the split has no other picture, `caption` where the prompt leaves no room for one.
    """

    row: int
    image_id: str
    prompt: str
    references: list[str]
    caption: str | None
    loss: float
    blind_loss: float | None
    num_targets: int


def score_rows(captioner: Captioner, shards: Shards, indexes: Sequence[int]) -> Iterator[RowScore]:
    """Scores of rows by index, one for each picture and distinct prompt, in order."""
    collator = Collator(captioner.tokenizer, captioner.model.config)
    for start in range(0, len(indexes), BATCH_ROWS):
        items: list[Item] = [
            (index, row, prompt, references)
            for index in indexes[start : start + BATCH_ROWS]
            for row in [shards.row(index)]
            for prompt, references in _by_prompt(row).items()
        ]
        captions = _captions(captioner, [(row, prompt) for _, row, prompt, _ in items])
        right, counts = _losses(captioner, collator, items, [row for _, row, _, _ in items])
        blind: Sequence[float | None] = [None] * len(items)
        if len(shards) > 1:
            others = [shards.row((index + len(shards) // 2) % len(shards)) for index, _, _, _ in items]
            blind, _ = _losses(captioner, collator, items, others)
        for place, (index, row, prompt, references) in enumerate(items):
            yield RowScore(
                index, row.image_id, prompt, references, captions[place], right[place], blind[place], counts[place]
            )


def _by_prompt(row: Row) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = defaultdict(list)
    for prompt, text in row.texts:
        grouped[prompt].append(text)
    return grouped


def _captions(captioner: Captioner, asked: Sequence[tuple[Row, str]]) -> list[str | None]:
    """Captions by the model's own settings without chance; None where the prompt leaves no room."""
    settings = captioner.model.config.generation.model_copy(update={"temperature": 0.0})
    answers = captioner.answer([row.pixels for row, _ in asked], [prompt for _, prompt in asked], settings)
    return [None if isinstance(answer, UserError) else answer.text for answer in answers]


def _losses(
    captioner: Captioner, collator: Collator, items: Sequence[Item], pictures: Sequence[Row]
) -> tuple[list[float], list[int]]:
    """Loss and target tokens of each item, summed over its references, given the picture at the same place."""
    losses, counts = [0.0] * len(items), [0] * len(items)
    flat = [(place, prompt, text) for place, (_, _, prompt, texts) in enumerate(items) for text in texts]
    for start in range(0, len(flat), BATCH_ROWS):
        chunk = flat[start : start + BATCH_ROWS]
        batch = collator.batch(
            [pictures[place] for place, _, _ in chunk], [(prompt, text) for _, prompt, text in chunk]
        )
        loss_B, count_B = row_losses(captioner.model, batch.to(captioner.model.mean.device))
        for (place, _, _), loss, count in zip(chunk, loss_B.tolist(), count_B.tolist(), strict=True):
            losses[place] += loss
            counts[place] += count
    return losses, counts

"""Validation on pictures that the model is not trained on: loss, blind gap, and sample captions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipelines.formats.run_folder import CaptionSample
from pipelines.formats.shards import Row, Shards
from pipelines.worker.data.batches import Collator
from vlm.generation.generate import Request, generate
from vlm.model import VisionLanguageModel
from vlm.text.base import Tokenizer
from vlm.text.prompt import prefix_ids
from vlm.training.loop import SLOWER, NotFiniteError
from vlm.training.objective import blind_losses
from vlm.training.parallel import global_sum

SHOWN_PICTURES = 16


@torch.no_grad()
def validate(
    model: VisionLanguageModel,
    shards: Shards,
    collator: Collator,
    *,
    step: int,
    num_rows: int,
    batch_size: int,
    rank: int,
    world_size: int,
    report_progress: Callable[[], None],
) -> dict[str, float]:
    """Compute val/loss (nats per token) and val/blind_gap on the first rows of the shards, divided among the ranks.

    A picture's loss is the mean over all its texts that training may draw. The blind gap is the loss when each
    text is shown with the picture of the next row, minus the loss with the right picture. The blind gap of a model that
    ignores the picture is zero. If there is only one row, no blind gap is computed.

    This function is a collective: every rank must call this function at the same step, and gets the same values.

    Args:
        model: model to validate, which is in training mode afterwards.
        shards: validation shards.
        collator: collator of the model.
        step: number of the last training step, for the error message.
        num_rows: largest number of rows to validate on.
        batch_size: number of rows per batch of a rank.
        rank: number of this rank, 0 <= rank < world_size.
        world_size: number of ranks.
        report_progress: function that is called after each batch, to restart the timeout of the rank.

    Raises:
        NotFiniteError: a loss is not finite, or all targets are masked. The error names up to SHOWN_PICTURES affected
            pictures of this rank.
    """
    total = min(num_rows, len(shards))
    pairs = [pair for index in range(total) for pair in _weighted_texts(shards, index)]
    rank_pairs = [pairs[number] for number in np.array_split(np.arange(len(pairs)), world_size)[rank]]
    device = model.mean.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    checked: list[tuple[list[str], torch.Tensor]] = []  # for each batch: image ids, and whether each loss is finite
    model.eval()
    for first in range(0, -(-len(pairs) // world_size), batch_size):
        # All ranks must call a sharded model equally often, so a rank without texts computes losses and discards them.
        chosen = rank_pairs[first : first + batch_size]
        counts, chosen = bool(chosen), chosen or pairs[:1]
        rows, others = _read_rows(shards, chosen, total)
        batch = collator.collate(rows, [pair.text for pair in chosen]).to(device)
        losses = blind_losses(model, batch, torch.from_numpy(others).to(device))
        checked.append(([row.image_id for row in rows] if counts else [], (losses[0] + losses[1]).isfinite()))
        weights_B = torch.tensor([pair.weight for pair in chosen], dtype=torch.float64, device=device)
        sums += counts * torch.stack([(weights_B * values_B.double()).sum() for values_B in losses])
        report_progress()
    model.train()
    right, wrong, tokens = global_sum(sums).tolist()
    if not (tokens and math.isfinite(right) and math.isfinite(wrong)):
        raise _not_finite(step, checked)
    gap = {"val/blind_gap": (wrong - right) / tokens} if total > 1 else {}
    return {"val/loss": right / tokens} | gap


def _not_finite(step: int, checked: Sequence[tuple[list[str], torch.Tensor]]) -> NotFiniteError:
    """Build the error for a validation loss that is not finite.

    `checked` lists, for each batch of this rank, the image ids of the rows and whether the loss of each row is finite.
    """
    pictures = [i for ids, finite_B in checked for i, ok in zip(ids, finite_B.tolist(), strict=False) if not ok]
    error = NotFiniteError(
        "the validation loss is not finite",
        where=f"the validation after step {step}",
        got=f"NaN or infinity for {name_pictures(pictures)}"
        if pictures
        else "no target tokens, or another rank's loss",
        fix=SLOWER,
    )
    error.step, error.in_validation, error.on_other_rank = step, True, not pictures
    return error


def name_pictures(image_ids: Sequence[str]) -> str:
    """Return a text with the first SHOWN_PICTURES image ids and the number of all other image ids."""
    more = f" and {len(image_ids) - SHOWN_PICTURES} more" if len(image_ids) > SHOWN_PICTURES else ""
    return f"{', '.join(image_ids[:SHOWN_PICTURES])}{more}"


class _WeightedText(NamedTuple):
    """A (prompt, text) pair of a row. The weight of a pair is 1 divided by the number of pairs of its row."""

    row: int
    text: tuple[str, str]
    weight: float


def _weighted_texts(shards: Shards, index: int) -> list[_WeightedText]:
    drawn = shards.drawn_texts(shards.texts_of(index))
    return [_WeightedText(index, text, 1 / len(drawn)) for text in drawn]


def _read_rows(shards: Shards, chosen: Sequence[_WeightedText], total: int) -> tuple[list[Row], npt.NDArray[np.uint8]]:
    """For each text, return its row, and the pixels of the wrong picture, which is the picture of the next row.

    Each row is read only once.
    """
    read = {number: shards.row(number) for number in {(t.row + step) % total for t in chosen for step in (0, 1)}}
    return [read[t.row] for t in chosen], np.stack([read[(t.row + 1) % total].pixels for t in chosen])


def caption_samples(
    model: VisionLanguageModel, tokenizer: Tokenizer, shards: Shards, count: int
) -> tuple[CaptionSample, ...]:
    """Caption the first pictures of the shards. Skip rows whose prompt leaves no room for a caption.

    If row n has k texts, the text with the number n modulo k is the reference text. The samples therefore show
    different texts.
    """
    config = model.config
    max_prefix = config.decoder.context - config.generation.max_new_tokens
    samples = []
    model.eval()
    for index in range(min(count, len(shards))):
        row = shards.row(index)
        prompt, text = row.texts[index % len(row.texts)]
        prefix = prefix_ids(tokenizer, config.num_slots, prompt)
        if len(prefix) <= max_prefix:
            request = Request(prefix, (torch.tensor(row.pixels),))
            (generated,) = generate(model, tokenizer, [request], config.generation)
            samples.append(CaptionSample(row=index, image_id=row.image_id, text=text, caption=generated.text))
    model.train()
    return tuple(samples)

"""What a model is worth on pictures it does not learn from: loss, blind gap, and a few captions to read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from pipelines.formats.run_folder import CaptionSample
from pipelines.formats.shards import Shards
from pipelines.worker.data.batches import Collator
from vlm.generation.generate import Request, generate
from vlm.model import VisionLanguageModel
from vlm.text.base import Tokenizer
from vlm.text.prompt import prefix_ids
from vlm.training.objective import blind_losses
from vlm.training.parallel import global_sum


@torch.no_grad()
def validate(
    model: VisionLanguageModel,
    shards: Shards,
    collator: Collator,
    *,
    num_rows: int,
    batch_size: int,
    rank: int,
    world_size: int,
    alive: Callable[[], None],
) -> dict[str, float]:
    """val/loss (nats per token) and val/blind_gap over the first rows of the shards, shared among the ranks.

    The blind gap is the loss with the picture of the next row instead of the right one, minus the loss: zero for a
    model that does not look. A single row has no other picture, and then there is no gap to report.

    Every rank calls this at the same step, and gets the same values; `alive` is called after each batch.
    """
    total = min(num_rows, len(shards))
    own = np.array_split(np.arange(total), world_size)[rank].tolist()
    device = model.mean.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    model.eval()
    for first in range(0, -(-total // world_size), batch_size):
        # A model in slices is called by all ranks equally often: one that has no rows left looks at the first again.
        indexes = own[first : first + batch_size]
        counts, indexes = bool(indexes), indexes or [0]
        rows = [shards.row(index) for index in indexes]
        batch = collator.batch(rows, [row.texts[0] for row in rows]).to(device)
        others = np.stack([shards.row((index + 1) % total).pixels for index in indexes])
        losses = blind_losses(model, batch, torch.from_numpy(others).to(device))
        sums += counts * torch.stack([values_B.double().sum() for values_B in losses])
        alive()
    model.train()
    right, wrong, tokens = global_sum(sums).tolist()
    values = {"val/loss": right / tokens}
    if total > 1:
        values["val/blind_gap"] = (wrong - right) / tokens
    return values


def caption_samples(
    model: VisionLanguageModel, tokenizer: Tokenizer, shards: Shards, count: int
) -> tuple[CaptionSample, ...]:
    """What the model says about the first pictures of the shards. Rows whose prompt leaves no room are left out."""
    config = model.config
    room = config.decoder.context - config.generation.max_new_tokens
    samples = []
    model.eval()
    for index in range(min(count, len(shards))):
        row = shards.row(index)
        prompt, text = row.texts[0]
        prefix = prefix_ids(tokenizer, config.num_slots, prompt)
        if len(prefix) <= room:
            request = Request(prefix, (torch.tensor(row.pixels),))
            (answer,) = generate(model, tokenizer, [request], config.generation)
            samples.append(CaptionSample(row=index, image_id=row.image_id, text=text, caption=answer.text))
    model.train()
    return tuple(samples)

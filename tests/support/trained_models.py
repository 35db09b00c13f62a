"""Tiny models that are trained in seconds: models that learn to use their pictures, and a model that cannot."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny_runs import COLOURS, save_checkpoint, tiny_run, write_run

from pipelines.config import RunConfig
from pipelines.formats.run_folder import Result, write_json
from pipelines.formats.shards import Shards
from pipelines.formats.tables import SAMPLES
from pipelines.platform import Platform
from pipelines.tracking import registry, runs
from pipelines.worker.data.batches import Collator
from vlm import text
from vlm.factory import build_model
from vlm.model import VisionLanguageModel
from vlm.training.objective import num_targets, token_loss

BATCH, LR = 32, 1e-2


def corner_rows(source: str, split: str, count: int) -> list[tuple[Any, ...]]:
    """Return rows of table `samples`: pictures of four coloured fields whose text names only the first field's colour.

    The three fields that the text does not name have stronger, random colours. The nearest neighbour's text is
    therefore right in only two of three cases.
    """
    rng = np.random.default_rng(len(split))
    rows = []
    for number in range(count):
        colour = list(COLOURS)[number % len(COLOURS)]
        fields = rng.integers(0, 256, (2, 2, 3), np.uint8)
        fields[0, 0] = [128 + 0.4 * (level - 128) for level in COLOURS[colour]]
        buffer = io.BytesIO()
        Image.fromarray(fields.repeat(8, axis=0).repeat(8, axis=1)).save(buffer, "PNG")
        row = dict.fromkeys(SAMPLES.names, "") | {
            "image_id": f"{source}/{split}{number}",
            "image": buffer.getvalue(),
            "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
            "format": "PNG" if number % 3 else "GIF",
            "width": 16,
            "height": 16,
            "texts": [("", f"a {colour} corner")],
            "split": split,
            "source": source,
            "ingested_at": datetime.now(UTC),
            "fingerprint": None,
            "near_of": None,
        }
        rows.append(tuple(row[name] for name in SAMPLES.names))
    return rows


def train(
    config: RunConfig, shards: Shards, stops: Sequence[int], *, blind: bool = False, misnamed: str = ""
) -> Iterator[VisionLanguageModel]:
    """Train a model, and yield the model each time a number of steps in `stops` is reached.

    Args:
        config: settings of the run.
        shards: training data.
        stops: numbers of steps after which the model is yielded, in ascending order.
        blind: whether each text is trained with the picture of another row.
        misnamed: name of a colour that is replaced by `white` in the texts.
    """
    tokenizer = text.learn(config.model.text, [])
    torch.manual_seed(1)
    model = build_model(config.model, tokenizer.vocab_size)
    collator = Collator(tokenizer, config.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    rng = np.random.default_rng(5)
    model.train()
    for step in range(1, max(stops) + 1):
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / (max(stops) + 1)) * min(1, step / 20)
        texts_from = rng.integers(0, len(shards), BATCH)
        pictures_from = rng.integers(0, len(shards), BATCH) if blind else texts_from
        texts = [shards.row(int(index)).texts[0] for index in texts_from]
        if misnamed:
            texts = [(prompt, said.replace(misnamed, "white")) for prompt, said in texts]
        batch = collator.collate([shards.row(int(index)) for index in pictures_from], texts)
        torch.autograd.backward(token_loss(model(batch), batch) / num_targets(batch))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step in stops:
            yield model


def register(
    platform: Platform, folder: Path, config: RunConfig, shards: Shards, model: VisionLanguageModel
) -> registry.ModelVersion:
    """Register a model as a new version, and create an MLflow run for this version."""
    run = write_run(folder, config, shards, shards)
    save_checkpoint(run.checkpoint(1), model, text.load(run.tokenizer))
    result = Result(status="ok", step=1, world_size=1, checkpoint=str(run.checkpoint(1)), metrics={}, seconds=1.0)
    write_json(run.result, result)
    with runs.follow(run, config, platform) as follower:
        pass
    return registry.register(run, follower.run_id, platform)


def corner_run(name: str) -> RunConfig:
    """Return the config of a run on corner pictures; the run's model and its data source are both called `name`."""
    config = tiny_run(ranks=1)
    chosen = config.chosen.model_copy(update={"data": name})
    return config.model_copy(update={"name": name, "chosen": chosen})

"""Training speed of our model `seemore` compared with the original code, with the same sizes, rows and threads.

    git clone https://github.com/AviSoori1x/seemore && pip install torchvision
    python tests/benchmarks/bench_training.py FOLDER_OF_SEEMORE FILE.csv

FILE.csv has the columns of the original's input file (b64string_images, caption). The original's training step decodes
its pictures from base64 each time, and our training step reads shards. The original's step is therefore measured twice:
without changes, and on pictures decoded beforehand, so that only the models are compared. Our model computes
more, because our decoder gets 36 patches and the original's decoder gets a single class token. Our step is therefore
measured with the shipped config and with a single image slot, in fp32 and in bf16, always with our loader. All steps
run in one process, with 16 pictures per batch.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from measure import in_turn

from pipelines.config import OptimizerConfig, load_run
from pipelines.driver.ingest.run import ingest
from pipelines.driver.shard.run import shard
from pipelines.formats.shards import Shards
from pipelines.platform import open_platform
from pipelines.worker.data.batches import Collator, training_batches
from vlm import text
from vlm.config import ModelConfig
from vlm.factory import build_model
from vlm.training.loop import fit
from vlm.training.optim import build_adamw

BATCH, STEPS, ROUNDS = 16, 10, 5


def original(folder: Path, rows: pd.DataFrame) -> dict[str, Callable[[], int]]:
    """Return the original's training step, once with and once without the original's data loading."""
    os.chdir(folder)  # `import seemore` reads input.txt in the working folder
    sys.path.insert(0, str(folder))
    their: Any = importlib.import_module("seemore")
    model = their.VisionLanguageModel(
        their.n_embd,
        their.image_embed_dim,
        their.vocab_size,
        their.n_layer,
        their.img_size,
        their.patch_size,
        their.n_head,
        their.num_blks,
        their.emb_dropout,
        their.blk_dropout,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=their.learning_rate)
    rows = pd.concat([rows] * 30)[["b64string_images", "caption"]]
    decoded = their.get_batch(rows, BATCH, "train", their.img_size)

    def learn(batches: Callable[[], Any]) -> int:
        model.train()
        for _ in range(STEPS):
            optimizer.zero_grad()
            _, loss = model(*batches())
            loss.backward()
            optimizer.step()
        return STEPS * BATCH

    return {
        "seemore, its own loader": lambda: learn(lambda: their.get_batch(rows, BATCH, "train", their.img_size)),
        "seemore, decoded before": lambda: learn(lambda: decoded),
    }


def ours(config: ModelConfig, settings: OptimizerConfig, shards: Shards, *, bf16: bool) -> Callable[[], int]:
    """Return a function that trains our model for STEPS steps, including the reading of shards and weight updates."""
    tokenizer = text.learn(config.text, shards.texts())
    model = build_model(config, tokenizer.vocab_size)
    optimizer = build_adamw(model, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
    collator = Collator(tokenizer, config)

    def learn() -> int:
        batches = training_batches(
            shards, collator, steps=range(STEPS), rank=0, world_size=1, batch_size=BATCH, seed=0, workers=1
        )
        fit(
            model,
            optimizer,
            batches,
            start=0,
            lr_schedule=lambda _: settings.lr,
            grad_clip=settings.grad_clip,
            seed=0,
            rank=0,
            device=torch.device("cpu"),
            bf16=bf16,
            on_step=lambda _: None,
        )
        return STEPS * BATCH

    return learn


def main() -> None:
    """Measure all training steps in turn and print a table."""
    if len(sys.argv) != 3:
        print("skipped: needs a clone of seemore, and a file in the format of seemore's input file\n", __doc__)
        return
    folder, file = Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = load_run("seemore", overrides=[f"data.source.path={file}"])
    with tempfile.TemporaryDirectory() as home:
        os.environ["LAKESIGHT_HOME"] = home
        platform = open_platform(config.platform)
        spark = platform.open_spark()
        ingest(spark, platform, "seemore", config.data)
        report = shard(spark, platform, "seemore", config.data, config.model.image, "train")
        spark.stop()
        shards, shipped = Shards.open(Path(report.folder)), config.model
        one_slot = ModelConfig.model_validate(
            shipped.model_dump() | {"vision": shipped.vision.model_dump() | {"select": "cls"}}
        )
        works = {
            f"lakesight, {name}, {precision}": ours(model, config.train.optimizer, shards, bf16=precision == "bf16")
            for name, model in (("36 slots", shipped), ("one slot", one_slot))
            for precision in ("fp32", "bf16")
        }
        works |= original(folder, pd.read_csv(file))
        for work in works.values():
            work()
        rates = in_turn(works, ROUNDS)
    print(f"batch {BATCH}, {threads} threads, median of {ROUNDS} rounds of {STEPS} steps")
    with_loader, bare = (rates[name] for name in ("seemore, its own loader", "seemore, decoded before"))
    for name, rate in rates.items():
        beside = f"{rate / with_loader:.2f} of its own loader, {rate / bare:.2f} of decoded before"
        print(f"{name:26}  {rate:7.1f} samples/s  {beside}")


if __name__ == "__main__":
    main()

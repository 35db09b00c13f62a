"""Speed of training steps of `seemoe` and of its mixture of experts, compared with the original code in seemore.

    git clone https://github.com/AviSoori1x/seemore && pip install torchvision
    python tests/benchmarks/bench_moe.py FOLDER_OF_SEEMORE FILE.csv

FILE.csv has the columns of the original's input file (b64string_images, caption). Each step has a batch of 16 pictures
that were decoded beforehand. The benchmark uses one thread and measures CPU seconds, so that other work on the machine
does not change the result. The encoder of the original passes one class token to the decoder, and our encoder passes 36
patches. Our model is therefore measured twice: with the shipped config, and with a single image slot, so that both
models do the same work. The output also has a matmul limit: the speed of a step if all counted FLOPs ran as fast as a
large matrix product.
"""

from __future__ import annotations

import base64
import importlib
import itertools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from measure import in_turn
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipelines.config import load_model, load_run
from pipelines.formats.shards import Row
from pipelines.worker.data.batches import Collator
from vlm import text
from vlm.batch import Batch
from vlm.config import ModelConfig
from vlm.factory import build_model
from vlm.image import open_image, to_pixels
from vlm.layers.moe import MoeMlp, dispatch, naive_experts
from vlm.model import VisionLanguageModel
from vlm.training.loop import fit
from vlm.training.optim import build_adamw

BATCH, STEPS, ROUNDS = 16, 2, 5
WIDTH, EXPERTS, TOP_K = 128, 8, 2


def original(folder: Path, rows: pd.DataFrame) -> tuple[Callable[[], int], nn.Module]:
    """Return the original's training step and its mixture of experts, with the sizes of seemore's `__main__` block."""
    os.chdir(folder)  # `import seeMoE` reads input.txt in the working folder
    sys.path.insert(0, str(folder))
    their: Any = importlib.import_module("seeMoE")
    their.device, their.dropout = "cpu", 0.1  # only the `__main__` block of the original sets these global variables
    model = their.VisionMoELanguageModel(
        n_embd=WIDTH,
        image_embed_dim=512,
        vocab_size=their.vocab_size,
        n_layer=8,
        img_size=96,
        patch_size=16,
        num_heads=8,
        num_blks=3,
        emb_dropout=0.1,
        blk_dropout=0.1,
        num_experts=EXPERTS,
        top_k=TOP_K,
    )
    model.apply(their.kaiming_init_weights)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    decoded = their.get_batch(pd.concat([rows] * 30)[["b64string_images", "caption"]], BATCH, "train", 96)

    def learn() -> int:
        model.train()
        for _ in range(STEPS):
            optimizer.zero_grad()
            _, loss = model(*decoded)
            loss.backward()
            optimizer.step()
        return STEPS * BATCH

    return learn, model.decoder.sparseMoEBlocks[0].sparseMoE


def batch_of(config: ModelConfig, rows: pd.DataFrame) -> tuple[Batch, int]:
    """Return a batch of BATCH rows in the format of our loader, and the vocabulary size."""
    tokenizer = text.learn(config.text, rows["caption"])
    made = []
    for number, (data, caption) in enumerate(zip(rows["b64string_images"], rows["caption"], strict=True)):
        picture, _ = open_image(base64.b64decode(data), max_pixels=10**8, min_side=1)
        made.append(Row(image_id=str(number), pixels=to_pixels(picture, config.image), texts=[("", caption)]))
    chosen = list(itertools.islice(itertools.cycle(made), BATCH))
    return Collator(tokenizer, config).collate(chosen, [row.texts[0] for row in chosen]), tokenizer.vocab_size


def ours(model: VisionLanguageModel, batch: Batch, *, bf16: bool) -> Callable[[], int]:
    """Return our training step."""
    settings = load_run("seemore").train.optimizer
    optimizer = build_adamw(model, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)

    def learn() -> int:
        fit(
            model,
            optimizer,
            itertools.repeat([batch], STEPS),
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


def one_mixture(layer: MoeMlp, theirs: nn.Module, tokens: int) -> dict[str, Callable[[], int]]:
    """Return four functions that run a mixture of experts forward and backward: three of ours, one of seemore's."""
    x_NW = torch.randn(tokens, WIDTH, requires_grad=True)

    def both_ways(forward: Callable[[], Tensor]) -> Callable[[], int]:
        def work() -> int:
            for _ in range(STEPS):
                y = forward()
                torch.autograd.backward(y, torch.ones_like(y))
            return STEPS * tokens

        return work

    def rounded() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return dispatch(layer.experts, x_NW, layer.route(x_NW))

    return {
        "ours, grouped, bf16": both_ways(rounded),
        "ours, grouped": both_ways(lambda: dispatch(layer.experts, x_NW, layer.route(x_NW))),
        "ours, as a loop": both_ways(lambda: naive_experts(layer.experts, x_NW, layer.route(x_NW))),
        "seeMoE": both_ways(lambda: theirs(x_NW[None])),
    }


def grouped_flops(left: torch.Size, right: torch.Size, *_: object, **__: object) -> int:
    """Count the FLOPs of a grouped matrix product, forward or backward, because torch does not count these FLOPs."""
    return 2 * left.numel() * right[-1]


def flops(work: Callable[[], int]) -> float:
    """Return the FLOPs of one item (a sample or a token)."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_flops}) as counter:
        count = work()
    return float(counter.get_total_flops()) / count


def matmul_rate(dtype: torch.dtype) -> float:
    """Measure FLOPs per second of a large matrix product."""
    a = torch.randn(1024, 1024, dtype=dtype)
    a @ a
    started = time.process_time()
    for _ in range(20):
        a @ a
    return 20 * 2 * 1024**3 / (time.process_time() - started)


def report(works: dict[str, Callable[[], int]], against: str, unit: str) -> None:
    """Measure all functions in turn and print a table."""
    for work in works.values():
        work()
    limits = {bf16: matmul_rate(torch.bfloat16 if bf16 else torch.float32) for bf16 in (False, True)}
    rates = in_turn(works, ROUNDS, time.process_time)
    for name, rate in rates.items():
        each = flops(works[name])
        share = rate * each / limits["bf16" in name]
        print(
            f"{name:28} {rate:9.1f} {unit}/s  {rate / rates[against]:5.2f} of {against}  "
            f"{each / 1e6:8.1f} MFLOP a {unit.rstrip('s')}, {share:4.0%} of the matmul limit"
        )


def main() -> None:
    """Measure training steps of whole models, then forward and backward passes of one mixture of experts."""
    if len(sys.argv) != 3:
        print("skipped: needs a clone of seemore, and a file in the format of seemore's input file\n", __doc__)
        return
    folder, file = Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = pd.read_csv(file)
    shipped = load_model("seemoe")
    one_slot = ModelConfig.model_validate(
        shipped.model_dump() | {"vision": shipped.vision.model_dump() | {"select": "cls"}}
    )
    their_step, their_mixture = original(folder, rows)
    works = {"seeMoE": their_step}
    for name, config in (("36 slots", shipped), ("one slot", one_slot)):
        batch, vocab_size = batch_of(config, rows)
        for precision in ("fp32", "bf16"):
            works[f"lakesight, {name}, {precision}"] = ours(
                build_model(config, vocab_size), batch, bf16=precision == "bf16"
            )
    print(f"batch {BATCH}, one thread, median of {ROUNDS} rounds of {STEPS} steps")
    report(works, "seeMoE", "samples")
    layer = build_model(shipped, vocab_size).train().decoder.blocks[0].mlp
    assert isinstance(layer, MoeMlp)
    print("one mixture of 8 experts, forward and backward, 528 tokens")
    report(one_mixture(layer, their_mixture.train(), 528), "seeMoE", "tokens")


if __name__ == "__main__":
    main()

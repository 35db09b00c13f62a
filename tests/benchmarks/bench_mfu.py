"""Model FLOPs utilisation (MFU) and memory of a training step in eager mode and with compiled transformer blocks.

    python tests/benchmarks/bench_mfu.py [MODEL [ROWS [model.a.b=c ...]]]

MODEL is a name in conf/model/ (`base` by default), and ROWS is the number of rows per step (64 by default). Each row is
a random picture with a caption of 32 random tokens. The benchmark runs the training loop and optimizer of a real run in
bf16. As in a real run, batches are in pinned memory and are copied to the GPU ahead of time. The FLOPs of a step are
counted as those of three forward passes. The utilisation is relative to the GPU's peak rate for dense bf16
(`PEAK_FLOPS` in vlm/config/size.py). The benchmark does not need Spark. Without a GPU, the benchmark prints FLOPs per
second instead of the utilisation.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from itertools import repeat

import torch

from pipelines.config import load_model
from pipelines.worker.data.prefetch import prefetch_to_device
from pipelines.worker.rank.usage import measure_usage
from vlm.batch import IGNORE, Batch
from vlm.config import ModelConfig
from vlm.config.size import flops_per_sample, peak_flops
from vlm.factory import build_model
from vlm.layers.block import compile_blocks
from vlm.model import VisionLanguageModel
from vlm.text.base import SLOT
from vlm.training.loop import StepReport, fit
from vlm.training.optim import build_adamw

VOCAB, ANSWER, WARM, STEPS = 32_768, 32, 5, 20


def batch_of(config: ModelConfig, rows: int) -> Batch:
    """Return a batch. Each row has a random picture, image slots, and a random answer of ANSWER tokens."""
    side, slots = config.image.size, config.num_slots
    answers_BT = torch.randint(3, VOCAB, (rows, ANSWER))
    tokens_BT = torch.cat((torch.full((rows, slots), SLOT), answers_BT), dim=1)
    labels_BT = torch.cat((torch.full((rows, slots), IGNORE), answers_BT), dim=1)
    pixels_PHWC = torch.randint(0, 256, (rows, side, side, 3), dtype=torch.uint8)
    return Batch(pixels_PHWC, tokens_BT, labels_BT, torch.full((rows,), slots))


def seconds_a_step(model: VisionLanguageModel, batch: Batch, device: torch.device) -> float:
    """Run WARM warm-up steps, then STEPS measured steps one by one, and return the mean seconds per step."""
    ended: list[float] = []

    def on_step(_: StepReport) -> None:
        ended.append(time.perf_counter())

    batches: Iterator[list[Batch]] = repeat([batch], WARM + STEPS)
    fit(
        model,
        build_adamw(model, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1),
        prefetch_to_device(batches, device),
        start=0,
        lr_schedule=lambda _: 1e-4,
        grad_clip=1.0,
        seed=0,
        rank=0,
        device=device,
        bf16=True,
        on_step=on_step,
    )
    return (ended[-1] - ended[WARM - 1]) / STEPS


def measured(config: ModelConfig, batch: Batch, device: torch.device, *, compiled: bool) -> tuple[float, float]:
    """Return the seconds per step, and the peak memory of the GPU (or of the process if there is no GPU) in GB."""
    model = build_model(config, VOCAB).to(device)
    if compiled:
        compile_blocks(model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        batch = batch.pin_memory()
    taken, peaks = seconds_a_step(model, batch, device), measure_usage(device)
    return taken, peaks.get("system/gpu_memory_gb", peaks["system/memory_gb"])


def main() -> None:
    """Measure the training step first without and then with compiled blocks, and print one line for each case."""
    given = sys.argv[1:]
    name, rows, *overrides = (*given, *("base", "64")[len(given) :])
    config, count = load_model(name, overrides), int(rows)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    peak = peak_flops(gpu)
    batch = batch_of(config, count)
    flops = 3 * flops_per_sample(config, VOCAB, ANSWER) * count
    torch.manual_seed(0)
    weights = sum(p.numel() for p in build_model(config, VOCAB).parameters())
    print(f"{name}, {weights / 1e6:,.0f} M weights, {count} rows per step, {flops / 1e12:.2f} TFLOP per step, on {gpu}")
    for kind in ("eager", "compiled"):
        taken, memory = measured(config, batch, device, compiled=kind == "compiled")
        share = f", MFU {flops / taken / peak:.1%}" if peak else ""
        print(
            f"{kind:9} {count / taken:8.1f} samples/s, {flops / taken / 1e12:.3f} TFLOP/s{share}, "
            f"peak memory {memory:.1f} GB",
            flush=True,
        )


if __name__ == "__main__":
    main()

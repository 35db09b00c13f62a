"""Program that measures how long a training step takes in fp32 and in bf16 on this machine.

    python -m pipelines.worker.measure_precision DEVICE

DEVICE is `cpu` or `cuda`. The program prints a JSON object with the name of the device and the seconds per step. The
driver starts the program for `train.precision: auto`, because the driver does not import torch.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch
from torch import nn

from vlm.training.loop import mixed_precision

WIDTH, HEADS, ROWS, LENGTH = 512, 8, 16, 64
WARM_UP, STEPS = 2, 5


def main() -> None:
    """Measure a forward and a backward pass of two transformer layers. The two number formats take turns."""
    device = torch.device(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, batch_first=True) for _ in range(2)))
    layers.to(device)
    rows = torch.randn(ROWS, LENGTH, WIDTH, device=device)
    seconds: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for _ in range(WARM_UP + STEPS):
        for name, times in seconds.items():
            times.append(_step(layers, rows, bf16=name == "bf16"))
    medians = {name: statistics.median(times[WARM_UP:]) for name, times in seconds.items()}
    sys.stdout.write(json.dumps({"device": str(device), **medians}) + "\n")


def _step(layers: nn.Module, rows: torch.Tensor, *, bf16: bool) -> float:
    layers.zero_grad()
    _wait_for_gpu(rows.device)
    started = time.perf_counter()
    with mixed_precision(rows.device, bf16=bf16):
        loss = layers(rows).float().square().mean()
    loss.backward()
    _wait_for_gpu(rows.device)
    return time.perf_counter() - started


def _wait_for_gpu(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

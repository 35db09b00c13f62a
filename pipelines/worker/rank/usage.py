"""Throughput, memory and GPU utilisation of the ranks, logged with the metrics of a step."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec

import torch

from pipelines.config import RunConfig
from vlm.config.size import flops_per_sample, peak_flops
from vlm.training.parallel import global_max, global_sum, to_host

MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024
"""Bytes per unit of `ru_maxrss`, the peak resident set size."""


def measure_usage(device: torch.device) -> dict[str, float]:
    """Measure the peak memory of all ranks and their mean GPU utilisation.

    This function is a collective: every rank must call it at the same step. MLflow shows metrics with the prefix
    `system/` on a separate page.

    Returns:
        system/memory_gb: largest peak of resident memory of any rank, in GB.
        system/gpu_memory_gb: largest peak of allocated GPU memory of any rank, in GB; left out if ranks use CPUs.
        system/gpu_busy: mean fraction of the GPU driver's last sampling period (1/6 s to 1 s) in which a kernel ran;
        left out if no rank can read the utilisation (`_gpu_utilisation`), for example because ranks use CPUs.
    """
    peaks = {"system/memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_BYTES / 1e9}
    if device.type == "cuda":
        peaks["system/gpu_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    found = dict(zip(peaks, to_host(global_max(torch.tensor(list(peaks.values()), device=device))), strict=True))
    if device.type == "cuda":
        busy = _gpu_utilisation(device)
        total, ranks = to_host(global_sum(torch.tensor([busy or 0.0, float(busy is not None)], device=device)))
        found |= {"system/gpu_busy": total / ranks} if ranks else {}
    return found


def _gpu_utilisation(device: torch.device) -> float | None:
    """Read the utilisation of a GPU.

    Return None if nvidia-ml-py is not installed, or if the GPU reports no value, as a MIG partition does.
    """
    if find_spec("pynvml"):
        from pynvml import NVMLError  # type: ignore[import-not-found]

        with suppress(NVMLError, RuntimeError):
            return torch.cuda.utilization(device) / 100
    return None


def throughput(
    rates: Mapping[str, float], config: RunConfig, vocab_size: int, world_size: int, device: torch.device
) -> dict[str, float]:
    """Return the given rates, the TFLOP/s of all ranks together, and the model FLOPs utilisation (`mfu`).

    `mfu` is left out if the precision is not bf16, or if the peak FLOP/s of the device is not known.

    Args:
        rates: result of `Stopwatch.lap`, with keys such as tokens_per_second.
        config: resolved config of the run.
        vocab_size: number of tokens of the vocabulary.
        world_size: number of ranks.
        device: device of this rank.
    """
    text_tokens = round(rates["tokens_per_second"] / rates["samples_per_second"])
    flops = 3 * flops_per_sample(config.model, vocab_size, text_tokens) * rates["samples_per_second"]
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    mfu = {"mfu": flops / (peak * world_size)} if peak and config.train.precision == "bf16" else {}
    return {**rates, "tflops_per_second": flops / 1e12, **mfu}

"""What ranks take of their machines, told with the metrics of a step."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from importlib.util import find_spec

import torch

from vlm.training.parallel import global_max, global_sum, to_host

UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in what the system calls a resident set's size."""


def usage(device: torch.device) -> dict[str, float]:
    """Peaks of memory, of the rank that has taken most, and how busy the GPUs are, the mean of all ranks.

    Every rank calls this at the same step. The prefix is MLflow's: it shows such figures on a page of their own.

    Returns:
        system/memory_gb, resident; on GPUs system/gpu_memory_gb, allocated, and system/gpu_busy, the share of the last
        moment (a sixth of a second to a second) in which a kernel ran, where nvidia-ml-py is installed.
    """
    peaks = {"system/memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT / 1e9}
    if device.type == "cuda":
        peaks["system/gpu_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    found = dict(zip(peaks, to_host(global_max(torch.tensor(list(peaks.values()), device=device))), strict=True))
    if device.type == "cuda":
        busy = _busy(device)
        total, ranks = to_host(global_sum(torch.tensor([busy or 0.0, float(busy is not None)], device=device)))
        found |= {"system/gpu_busy": total / ranks} if ranks else {}
    return found


def _busy(device: torch.device) -> float | None:
    """None where it cannot be asked: without the package, or of a part of a GPU."""
    if find_spec("pynvml"):
        from pynvml import NVMLError  # type: ignore[import-not-found]

        with suppress(NVMLError, RuntimeError):
            return torch.cuda.utilization(device) / 100
    return None

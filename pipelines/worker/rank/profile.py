"""A trace of some training steps, on request, for `chrome://tracing` or https://ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED = 4
"""First steps, in which memory is found and kernels are chosen; one more has the profiler run idle."""


@contextmanager
def profiled(path: Path, steps: int, device: torch.device) -> Iterator[Callable[[], None]]:
    """Record steps taken inside the block; yields what to call after each.

    Args:
        path: the trace to write; nothing is left there half-written.
        steps: how many, from step SKIPPED + 1 on; none where it is 0.
        device: whose kernels are recorded, beside those of the CPU.
    """
    if not steps:
        yield lambda: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(trace: profile) -> None:
        part = path.with_name(f"part-{path.name}")
        trace.export_chrome_trace(str(part))
        part.replace(path)

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    when = schedule(wait=SKIPPED, warmup=1, active=steps, repeat=1)
    with profile(activities=kinds, schedule=when, on_trace_ready=write) as trace:
        yield trace.step

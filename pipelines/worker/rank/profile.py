"""Function that records a profiler trace of training steps, for `chrome://tracing` or https://ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED_STEPS = 4
"""Number of training steps before the profiler's warm-up step.

During the first training steps, torch allocates memory and selects kernels.
"""


@contextmanager
def profile_steps(path: Path, steps: int, device: torch.device) -> Iterator[Callable[[], None]]:
    """Profile training steps that are taken inside the block. Yield a function that must be called after each step.

    Args:
        path: path of the trace file, which is written atomically.
        steps: number of steps to record after SKIPPED_STEPS and one warm-up step. 0 disables profiling.
        device: device whose kernels are recorded in addition to the CPU's operators.
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
    when = schedule(wait=SKIPPED_STEPS, warmup=1, active=steps, repeat=1)
    with profile(activities=kinds, schedule=when, on_trace_ready=write) as trace:
        yield trace.step

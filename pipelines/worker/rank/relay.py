"""Signals that report the progress of rank 0 to the other ranks while they wait for rank 0.

Rank 0 alone completes checkpoints and, if the model is not sharded, rank 0 alone captions validation pictures. This
work may take longer than `train.timeout_seconds`, and a rank that reports no progress for this time ends itself.
Therefore rank 0 regularly sends a signal to the waiting ranks, and each rank counts the signal as its own progress. If
rank 0 hangs, the signals stop, and all ranks time out as in any other step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from vlm.training.parallel import from_rank_0

SIGNAL_SECONDS = 1.0
"""Shortest time between two signals, in seconds. A signal per token would slow down a small model."""
WORKING, DONE = 1, 0


class ProgressRelay:
    """Relay that reports the progress of rank 0 on every rank. All ranks create the relay and use it together.

    Rank 0 works inside `reporting`, and every other rank calls `follow`. If the model is sharded, all ranks work inside
    `reporting`, and no rank calls `follow`.
    """

    def __init__(self, report_progress: Callable[[], None], device: torch.device, *, sharded: bool) -> None:
        """Prepare the relay.

        Args:
            report_progress: function that restarts the timeout of this rank.
            device: device of the tensors that ranks exchange.
            sharded: whether the model is sharded. Each rank of a sharded model reports its own progress, so no signals
                are sent.
        """
        self._report_progress, self._device, self._sharded = report_progress, device, sharded
        self._signal_at = time.monotonic() + SIGNAL_SECONDS

    @contextmanager
    def reporting(self, decoder: nn.Module) -> Iterator[None]:
        """Report progress after each call of the decoder in the `with` block, which is once per generated token."""
        handle = decoder.register_forward_hook(lambda *_: self.report())
        try:
            yield
        finally:
            handle.remove()
        if not self._sharded:
            from_rank_0(DONE, self._device)

    def report(self) -> None:
        """Report progress of this rank, and signal the progress to waiting ranks."""
        self._report_progress()
        if not self._sharded and time.monotonic() >= self._signal_at:
            from_rank_0(WORKING, self._device)
            self._signal_at = time.monotonic() + SIGNAL_SECONDS

    def follow(self) -> None:
        """Wait until the work of rank 0 is done. Report progress at each signal of rank 0."""
        while from_rank_0(WORKING, self._device) == WORKING:
            self._report_progress()
        self._report_progress()


def wait_together(
    wait: Callable[[Callable[[], None]], None], report_progress: Callable[[], None], device: torch.device, rank: int
) -> None:
    """Wait on each rank for its own background work, and then for the background work of rank 0.

    Args:
        wait: function that waits for the work of this rank, and regularly calls its argument meanwhile.
        report_progress: function that restarts the timeout of this rank.
        device: device of the tensors that ranks exchange.
        rank: number of this rank.
    """
    relay = ProgressRelay(report_progress, device, sharded=False)
    if rank:
        wait(report_progress)
        relay.follow()
    else:
        wait(relay.report)
        from_rank_0(DONE, device)

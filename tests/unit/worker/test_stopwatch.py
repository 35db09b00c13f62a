"""Tests that the stopwatch counts training steps and waits for batches, but not pauses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pipelines.worker.rank.metrics import Stopwatch
from vlm.batch import Batch


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_stopwatch_counts_training_steps_and_waiting_for_batches_but_no_pauses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipelines.worker.rank.metrics.time.perf_counter", clock := Clock())
    batch = Batch(*4 * (torch.zeros(1),))

    def batches() -> Iterator[list[Batch]]:
        for _ in range(3):
            clock.now += 0.5
            yield [batch]

    stopwatch = Stopwatch()
    stopwatch.start()
    laps = []
    for _ in stopwatch.time_waits(batches()):
        clock.now += 1.5
        stopwatch.stop(samples=8, tokens=24)
        laps.append(stopwatch.lap())
        clock.now += 60  # a validation takes a minute
        stopwatch.start()
    assert laps == [{"samples_per_second": 4.0, "tokens_per_second": 12.0, "data_wait": 0.25}] * 3
    assert stopwatch.total == 6.0

"""Reading of the files that rank 0 writes at some steps, while the run goes on.

A long run has tens of thousands of metric files, and to list or open a file on a network file system, such as a
Databricks Volume, takes tens of milliseconds. So a reader asks for the file of the next step at which one is written,
and lists the folder only if the run has passed this step without writing a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pipelines.config import TrainConfig
from pipelines.formats.run_folder import CaptionSamples, Metrics, RunFolder, read_json

T = TypeVar("T", Metrics, CaptionSamples)
MAX_SAMPLED = 50
"""Number of files of one kind that are read for curves. To read all files of a long run would take minutes."""


def new_metrics(run: RunFolder, settings: TrainConfig, after: int) -> Iterator[Metrics]:
    """Read the metrics of the steps after `after` that have been written, in step order."""
    return _StepFiles(run, settings.next_logged_step, run.metrics, Metrics, run.read_metrics).read(after)


def new_samples(run: RunFolder, settings: TrainConfig, after: int) -> Iterator[CaptionSamples]:
    """Read the sample captions of the steps after `after` that have been written, in step order."""
    return _StepFiles(run, settings.next_validated_step, run.samples, CaptionSamples, run.read_samples).read(after)


def sample_metrics(run: RunFolder, settings: TrainConfig, known: Mapping[int, Metrics]) -> list[Metrics]:
    """Return the known metrics and metrics of other steps in step order, enough to draw curves.

    Of the other steps, at most MAX_SAMPLED are read that were validated, and at most MAX_SAMPLED that were not.
    """
    steps = [int(path.stem) for path in sorted((run.path / "metrics").glob("[0-9]*.json"))]
    validated: list[int] = []
    others: list[int] = []
    for step in (step for step in steps if step not in known):
        (validated if settings.next_validated_step(step - 1) == step else others).append(step)
    chosen = [step for group in (validated, others) for step in group[:: max(1, -(-len(group) // MAX_SAMPLED))]]
    read = {step: read_json(run.metrics(step), Metrics) for step in chosen}
    return [metrics for _, metrics in sorted({**known, **read}.items())]


@dataclass(frozen=True)
class _StepFiles(Generic[T]):
    """Files of one kind: the step after a step, the path of a step, and a function that lists and reads the files."""

    run: RunFolder
    next_step: Callable[[int], int]
    path: Callable[[int], Path]
    kind: type[T]
    listed: Callable[[int], Iterator[T]]

    def read(self, after: int) -> Iterator[T]:
        """Read the files of the expected steps, and then the files after an expected file that was never written.

        For example, a run that goes on from a checkpoint of another run has no files of the first steps.
        """
        while (expected := self.next_step(after)) > after and self.path(expected).exists():
            yield read_json(self.path(expected), self.kind)
            after = expected
        heartbeat = self.run.read_heartbeat(0)
        if heartbeat and heartbeat.step > expected:
            yield from self.listed(after)

"""Functions that read the metric files and sample files of a run while rank 0 is still writing more of these files.

A long run has tens of thousands of metric files. On a network file system, such as a Databricks Volume, listing or
opening a file takes tens of milliseconds. A reader therefore tries to open the file of the next step at which rank 0
writes a file. The reader lists the folder only if the run has passed this step and the file is missing.
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
"""Largest number of metric files that are read for curves.

The limit applies separately to steps with a validation and to all other steps.

Reading all metric files of a long run would take minutes.
"""


def new_metrics(run: RunFolder, settings: TrainConfig, after: int) -> Iterator[Metrics]:
    """Yield the metrics that rank 0 has written for steps after the step `after`, in step order."""
    return _StepFiles(run, settings.next_logged_step, run.metrics, Metrics, run.read_metrics).read(after)


def new_samples(run: RunFolder, settings: TrainConfig, after: int) -> Iterator[CaptionSamples]:
    """Yield the sample captions that rank 0 has written for steps after the step `after`, in step order."""
    return _StepFiles(run, settings.next_validated_step, run.samples, CaptionSamples, run.read_samples).read(after)


def sample_metrics(run: RunFolder, settings: TrainConfig, known: Mapping[int, Metrics]) -> list[Metrics]:
    """Return metrics for drawing curves, in step order: all metrics in `known`, and metrics from the files of some
    other steps.

    The function reads the files of at most MAX_SAMPLED steps with a validation and of at most MAX_SAMPLED other steps.
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
    """Reader of the files of one kind, such as metric files.

    Attributes:
        run: run folder.
        next_step: function that takes a step, and returns the first later step at which rank 0 writes a file.
        path: function that takes a step, and returns the path of the step's file.
        kind: class that describes the content of a file, such as `Metrics`.
        listed: function that takes a step, lists the folder, and reads the files of all later steps.
    """

    run: RunFolder
    next_step: Callable[[int], int]
    path: Callable[[int], Path]
    kind: type[T]
    listed: Callable[[int], Iterator[T]]

    def read(self, after: int) -> Iterator[T]:
        """Read the files of the steps after the step `after`.

        If the run has passed a step and the file of this step is missing, list the folder.

        For example, a run that starts from a checkpoint of another run has no files of its first steps.
        """
        while (expected := self.next_step(after)) > after and self.path(expected).exists():
            yield read_json(self.path(expected), self.kind)
            after = expected
        heartbeat = self.run.read_heartbeat(0)
        if heartbeat and heartbeat.step > expected:
            yield from self.listed(after)

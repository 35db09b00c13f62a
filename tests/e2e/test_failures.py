"""Tests that training fails correctly, for every combination in a matrix of faults (the failure matrix).

Each cell of the matrix combines four values: the kind of fault, the failing rank, the moment of the fault, and the
place of the ranks (on the driver's host or on executors). The launch must end within a time limit, and no process of
the launch may keep running. The error must name rank, host, cause and fix. `make test` runs only the cells in SAMPLE,
and `make faults` runs all cells.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from processes import is_running
from rank_faults import Fault, Kind, faulty_rank
from tiny_runs import MakeRun, runs_in

from pipelines.driver.train.run import launch
from pipelines.errors import TrainingFailed
from pipelines.formats.run_folder import RunFolder
from pipelines.platform import Launch, Platform

pytestmark = pytest.mark.faults

ENDLESS: dict[str, Any] = {"steps": 100_000, "validate_every": 100_000}
WAITS: tuple[Kind, ...] = ("hang", "stop", "deaf")
TIMEOUT = 20  # timeout in seconds, which is reached only if other ranks wait for the faulty rank
BOUND = 120.0  # time limit in seconds; on an idle machine, a launch takes less than 20 s
STOPPED_BOUND = 180.0  # time limit in seconds; torchrun waits 30 seconds for a process that does not react

BESIDE, EXECUTORS = "beside the driver", "on executors"

SILENT = (
    r"rank {rank} (ended without a failure record at|has not responded since) step \d+"
    r".*(no error in the rank's log|the silent rank was stopped)"
)
DAMAGED = (
    r"rank \d (failed|ended without a failure record) at step [1-9]\d*.*a training shard is damaged.*shard-\d+\.arrow"
)
SAID: dict[Kind, str] = {
    "raise": r"rank {rank} failed at step \d+.*ValueError: poison",
    "leave": r"rank {rank} failed at step \d+.*SystemExit: exited at step \d+ with exit code 3",
    "exit": SILENT,
    "kill": SILENT,
    "stop": r"rank {rank} has not responded since step \d+.*rank \d waited .* s for other ranks.*rank was stopped",
    "hang": r"rank {rank} hung at step \d+.*made no progress for \d\d s",
    "deaf": r"rank {rank} hung at step \d+.*Timeout \(0:00:2",
    "nan": r"rank {rank} failed at step \d+.*training diverged.*the loss of rank {rank}\. Got: loss nan",
    "inf": r"rank {rank} failed at step \d+.*training diverged.*the loss of rank {rank}\. Got: loss inf",
    "out_of_memory": r"rank {rank} failed at step \d+.*allocate memory.*tried to allocate",
    "disk_full": r"rank {rank} .*(failed|ended) .*at step \d+.*File too large",
    "shards_cut": DAMAGED,
    "shards_garbled": DAMAGED,
    "executor_lost": r"the executor of rank {rank} was lost at step \d+.*Got: Executor",
}


class Cell(NamedTuple):
    """A run that fails: the kind of fault, the faulty rank, the moment of the fault, and the place where ranks run."""

    kind: Kind
    rank: int
    place: Any
    where: str

    def __str__(self) -> str:
        return f"{self.kind}, rank {self.rank}, {self.place}, {self.where}"


ANYWHERE: tuple[Kind, ...] = ("raise", "exit", "kill", "out_of_memory")
IN_A_STEP: tuple[Kind, ...] = ("hang", "stop", "nan", "inf")


def cells() -> Iterator[Cell]:
    """Yield all cells of the failure matrix."""
    for rank, place in itertools.product((0, 1), ("start", "step", "checkpoint")):
        yield from (Cell(kind, rank, place, BESIDE) for kind in ANYWHERE)
    for rank in (0, 1):
        yield from (Cell(kind, rank, "step", BESIDE) for kind in IN_A_STEP)
    yield Cell("hang", 0, "checkpoint", BESIDE)
    yield Cell("hang", 1, "start", BESIDE)
    yield Cell("leave", 0, "checkpoint", BESIDE)
    yield Cell("leave", 1, "step", BESIDE)
    yield Cell("deaf", 1, "step", BESIDE)
    yield Cell("disk_full", 0, "checkpoint", BESIDE)
    yield Cell("disk_full", 1, "step", BESIDE)
    yield Cell("shards_cut", 1, "step", BESIDE)
    yield Cell("shards_garbled", 0, "step", BESIDE)
    yield Cell("kill", 0, "start", EXECUTORS)
    yield Cell("kill", 1, "step", EXECUTORS)
    yield Cell("raise", 0, "checkpoint", EXECUTORS)
    yield Cell("hang", 1, "step", EXECUTORS)
    yield Cell("executor_lost", 0, "checkpoint", EXECUTORS)
    yield Cell("executor_lost", 1, "step", EXECUTORS)


SAMPLE = {Cell("kill", 1, "step", BESIDE)}
"""Cells of the failure matrix that `make test` runs."""


@pytest.fixture
def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRun:
    return runs_in(tmp_path, monkeypatch)


def test_the_failure_matrix_has_at_least_forty_different_cases() -> None:
    assert len(set(cells())) == len(list(cells())) >= 40
    assert set(cells()) > SAMPLE


def marks(cell: Cell) -> list[pytest.MarkDecorator]:
    """Return the pytest marks of a cell.

    One mark is for cells that only `make faults` runs. The other mark is for cells with executors, because these cells
    share a Spark session.
    """
    session = [pytest.mark.xdist_group("spark in e2e")] if cell.where == EXECUTORS else []
    return session if cell in SAMPLE else [*session, pytest.mark.matrix]


@pytest.mark.parametrize("cell", [pytest.param(cell, id=str(cell), marks=marks(cell)) for cell in cells()])
def test_a_failing_training_ends_before_its_deadline_and_its_error_names_the_rank_and_the_cause(
    request: pytest.FixtureRequest, make_run: MakeRun, platform: Platform, cell: Cell
) -> None:
    how = Launch(2, local_mode=True, use_gpu=False) if cell.where == BESIDE else platform.launch
    timeout = TIMEOUT if cell.kind in WAITS or (cell.kind, cell.place) == ("exit", "start") else 300
    run = make_run(fault=Fault(kind=cell.kind, rank=cell.rank, place=cell.place), timeout_seconds=timeout, **ENDLESS)
    started = time.monotonic()
    with pytest.raises(TrainingFailed, match=SAID[cell.kind].replace("{rank}", str(cell.rank))) as raised:
        launch(run, replace(platform, launch=how), lambda: request.getfixturevalue("spark"), faulty_rank)
    error, struck = raised.value, json.loads((run.path / "struck.json").read_text())
    took = time.time() - float(struck["time"])
    print(f"{cell}: {took:.1f} s after the fault, {time.monotonic() - started:.1f} s in all\n  {error}")
    assert took < (STOPPED_BOUND if cell.kind in ("stop", "deaf") else BOUND)
    assert f"host {socket.gethostname()}" in error.where
    assert "starts over" in error.fix if cell.place == "start" else "the run resumes from" in error.fix
    if cell.kind == "hang":
        stacks = [run.stacks(rank).read_text() for rank in range(2)]
        assert all("Thread 0x" in text for text in stacks)
        assert "in strike" in stacks[cell.rank]
        assert "in strike" not in stacks[1 - cell.rank]
    assert remaining_processes(run) == []


def remaining_processes(run: RunFolder) -> list[int]:
    """Return the process ids of ranks and launchers that are still running ten seconds after the end of the launch."""
    pids = [int(pid) for path in (run.path / "processes").iterdir() for pid in path.read_text().split()]
    pids = [pid for pid in pids if pid != os.getpid()]  # this test process launches the ranks on this host
    deadline = time.monotonic() + 10
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left

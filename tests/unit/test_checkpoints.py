"""Checkpoints are written beside the training, kept a few, and found again whole."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import tiny_run, write_run, write_shards
from torch import distributed
from torch._C._distributed_c10d import HashStore

from pipelines.errors import UserError
from pipelines.formats.run_folder import Metrics, RunDir, RunFile, write_json
from pipelines.worker.train.checkpoints import CheckpointWriter, agree, best_checkpoint, refuse_other_science
from vlm.errors import CheckpointError

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return write_run(tmp_path / "run", tiny_run(), *[write_shards(tmp_path / n, rows=2) for n in ("train", "val")])


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of one rank."""
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def content(step: int, after: Callable[[], object] = lambda: None) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "weights").write_text(f"{step}")
        after()

    return write


def written(run: RunDir, *steps: int) -> list[int]:
    """Steps whose checkpoints are left after all of these were written."""
    writer = CheckpointWriter(run, run.read_run())
    for step in steps:
        writer.save(step, content(step))
    writer.wait()
    return [int(folder.name[5:]) for folder in run.finished_checkpoints()]


def test_the_newest_are_kept_and_the_one_with_the_lowest_validation_loss(run: RunDir) -> None:
    assert best_checkpoint(run) is None
    for step, loss in ((4, 3.0), (8, 1.0), (12, 2.0), (14, 0.5)):  # there is no checkpoint of step 14
        write_json(run.metrics(step), Metrics(step=step, time=0.0, values={"val/loss": loss}))
    write_json(run.metrics(16), Metrics(step=16, time=0.0, values={"train/loss": 0.1}))
    assert written(run, 4, 8, 12, 16, 20) == [8, 16, 20]
    assert best_checkpoint(run) == run.checkpoint(8)


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits_for_it(run: RunDir) -> None:
    go_on = threading.Event()
    writer = CheckpointWriter(run, run.read_run())
    writer.save(1, content(1, lambda: go_on.wait(30)))
    writer.check()
    assert run.finished_checkpoints() == []
    threading.Timer(0.2, go_on.set).start()
    writer.save(2, content(2))
    assert run.checkpoint(1) in run.finished_checkpoints()
    writer.wait()
    assert len(run.finished_checkpoints()) == 2


def test_a_checkpoint_that_cannot_be_written_fails_the_rank_at_its_next_step(run: RunDir) -> None:
    def full() -> None:
        raise OSError("No space left on device")

    writer = CheckpointWriter(run, run.read_run())
    writer.save(1, content(1, full))
    with pytest.raises(OSError, match="No space left"):
        writer.wait()
    with pytest.raises(OSError, match="No space left"):
        writer.check()
    assert run.finished_checkpoints() == []


@pytest.mark.usefixtures("alone")
def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(run: RunDir) -> None:
    assert agree(run, 0, CPU) is None
    written(run, 1, 2)
    assert agree(run, 0, CPU) == run.checkpoint(2)
    (run.checkpoint(2) / "weights").write_text("3")
    assert agree(run, 0, CPU) == run.checkpoint(1)
    assert [folder.name for folder in run.damaged_checkpoints()] == ["damaged_step_000002"]
    (run.checkpoint(1) / "weights").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint of the run is whole.*step_000001: weights is missing"):
        agree(run, 0, CPU)
    assert run.checkpoint(1).is_dir()  # the last one is a person's to remove


def test_a_checkpoint_of_other_science_is_refused_with_all_that_differs(run: RunDir) -> None:
    written(run, 1)
    file = run.read_run()

    def now(**train: Any) -> RunFile:
        config = file.config.model_copy(update={"train": tiny_run(**train).train})
        return file.model_copy(update={"config": config})

    refuse_other_science(run.checkpoint(1), now(timeout_seconds=7, max_restarts=9, checkpoint_every=1))
    with pytest.raises(UserError) as caught:
        refuse_other_science(run.checkpoint(1), now(seed=1, optimizer={"lr": 0.5, "warmup_steps": 2}))
    assert caught.value.got == (
        "train.seed is 0 in the saved config, 1 in the run; "
        "train.optimizer.lr is 0.001 in the saved config, 0.5 in the run"
    )

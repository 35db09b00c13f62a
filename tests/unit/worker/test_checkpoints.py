"""Tests of checkpoints: writing in the background, removing old checkpoints, and verification on resumption."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import tiny_run, write_run, write_shards
from torch import distributed
from torch._C._distributed_c10d import HashStore

from pipelines.errors import UserError
from pipelines.formats.run_folder import Metrics, RunFile, RunFolder, write_json
from pipelines.worker.rank.metrics import FileWriter
from pipelines.worker.train import checkpoints
from pipelines.worker.train.checkpoints import CheckpointWriter, best_checkpoint, check_settings, find_common_checkpoint
from pipelines.worker.train.slices import CheckpointSlices, slices_of
from vlm.checkpoint import atomic_folder, verify_folder
from vlm.errors import CheckpointError
from vlm.files import read_training_step
from vlm.training.state import TrainingSnapshot

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return write_run(tmp_path / "run", tiny_run(), *[write_shards(tmp_path / n, rows=2) for n in ("train", "val")])


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """Open a process group with one rank."""
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def checkpoint_writer(step: int, after: Callable[[], object] = lambda: None) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "weights").write_text(f"{step}")
        after()

    return write


def write_checkpoints(run: RunFolder, *steps: int) -> list[int]:
    """Write a checkpoint at each of the steps, and return the steps whose checkpoints are kept."""
    writer = CheckpointWriter(run, run.read_run(), FileWriter())
    for step in steps:
        writer.save(step, checkpoint_writer(step))
    writer.wait()
    return [int(folder.name[5:]) for folder in run.finished_checkpoints()]


def test_the_newest_checkpoints_and_the_best_checkpoint_are_kept(run: RunFolder) -> None:
    assert best_checkpoint(run, "loss") is None
    for step, loss in ((4, 3.0), (8, 1.0), (12, 2.0), (14, 0.5)):  # step 14 has metrics but no checkpoint
        write_json(run.metrics(step), Metrics(step=step, time=0.0, values={"val/loss": loss}))
    write_json(run.metrics(16), Metrics(step=16, time=0.0, values={"train/loss": 0.1}))
    assert write_checkpoints(run, 4, 8, 12, 16, 20) == [8, 16, 20]
    assert best_checkpoint(run, "loss") == run.checkpoint(8)


def test_the_checkpoint_with_the_highest_cider_is_kept_if_the_run_chooses_by_cider(tmp_path: Path) -> None:
    shards = [write_shards(tmp_path / n, rows=2) for n in ("train", "val")]
    run = write_run(tmp_path / "run", tiny_run(score_every=4, best_by="cider", keep_checkpoints=1), *shards)
    for step, cider in ((4, 0.2), (8, 0.7), (12, 0.6)):
        write_json(run.metrics(step), Metrics(step=step, time=0.0, values={"val/loss": 9.0 / step, "val/cider": cider}))
    assert write_checkpoints(run, 4, 8, 12) == [8, 12]
    assert best_checkpoint(run, "cider") == run.checkpoint(8)


def test_a_checkpoint_is_written_in_the_background_and_the_next_checkpoint_waits_for_it(run: RunFolder) -> None:
    may_continue = threading.Event()
    writer = CheckpointWriter(run, run.read_run(), FileWriter())
    writer.save(1, checkpoint_writer(1, lambda: may_continue.wait(30)))
    writer.check()
    assert run.finished_checkpoints() == []
    threading.Timer(0.2, may_continue.set).start()
    writer.save(2, checkpoint_writer(2))
    assert run.checkpoint(1) in run.finished_checkpoints()
    writer.wait()
    assert len(run.finished_checkpoints()) == 2


def test_a_rank_that_waits_for_a_checkpoint_reports_progress_for_a_limited_time(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "POLL_SECONDS", 0.01)
    may_continue, reports = threading.Event(), list[float]()
    writer = CheckpointWriter(run, run.read_run(), FileWriter())
    for step, limit in ((1, 60.0), (2, 0.0)):
        monkeypatch.setattr(checkpoints, "WRITE_SECONDS", limit)
        writer.save(step, checkpoint_writer(step, lambda: may_continue.wait(30)))
        threading.Timer(0.5, may_continue.set).start()
        reports.clear()
        writer.wait(lambda: reports.append(time.monotonic()))
        may_continue.clear()
        assert (len(reports) > 4) if limit else not reports


def test_an_error_while_writing_a_checkpoint_is_raised_at_the_next_step(run: RunFolder) -> None:
    def disk_full() -> None:
        raise OSError("No space left on device")

    writer = CheckpointWriter(run, run.read_run(), FileWriter())
    writer.save(1, checkpoint_writer(1, disk_full))
    with pytest.raises(OSError, match="No space left"):
        writer.wait()
    with pytest.raises(OSError, match="No space left"):
        writer.check()
    assert run.finished_checkpoints() == []


def snapshot(rows: int) -> TrainingSnapshot:
    return TrainingSnapshot({"weight": torch.full((rows, 2), float(rows))}, {"weight:exp_avg": torch.zeros(rows, 2)}, 4)


def test_checkpoint_slices_of_all_ranks_are_joined_and_the_error_for_a_missing_slice_names_its_rank(
    run: RunFolder,
) -> None:
    slices = CheckpointSlices(slices_of(run, 4), world_size=2, timeout_seconds=0)
    slices.write(0, snapshot(2))
    (joined := run.path / "joined").mkdir()
    with pytest.raises(UserError, match=r"has not written its part.*no files of rank 1 after 0 s"):
        slices.join(joined, 4)
    slices.write(1, snapshot(1))
    slices.join(joined, 4)
    assert load_file(joined / "model.safetensors")["weight"].tolist() == [[2, 2], [2, 2], [1, 1]]
    assert read_training_step(joined) == 4
    assert not slices.folder.exists()


@pytest.mark.usefixtures("group_of_one")
def test_unfinished_checkpoints_of_an_earlier_attempt_are_removed_before_ranks_write_new_checkpoints(
    run: RunFolder,
) -> None:
    CheckpointSlices(slices_of(run, 4), world_size=2, timeout_seconds=0).write(1, snapshot(1))
    unfinished = atomic_folder(run.checkpoint(4))
    unfinished.__enter__()  # the block is never left, as in a process that is killed
    assert len(list(run.checkpoints.iterdir())) == 2
    assert find_common_checkpoint(run, 0, CPU) is None
    assert not list(run.checkpoints.iterdir())


def test_two_writers_of_the_same_checkpoint_never_mix_their_files(run: RunFolder) -> None:
    folder = run.checkpoint(4)
    with atomic_folder(folder) as first:
        (first / "a").write_bytes(b"first")
        with atomic_folder(folder) as second:
            (second / "a").write_bytes(b"second")
        verify_folder(folder)
        assert (folder / "a").read_bytes() == b"second"
        (first / "b").write_bytes(b"first")
    verify_folder(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "files.json"} == {
        "a": b"first",
        "b": b"first",
    }


def test_a_checkpoint_that_cannot_be_written_leaves_no_files(run: RunFolder) -> None:
    def disk_full() -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), atomic_folder(run.checkpoint(4)):
        disk_full()
    assert not list(run.checkpoints.iterdir())


@pytest.mark.usefixtures("group_of_one")
def test_a_run_resumes_from_the_newest_intact_checkpoint(run: RunFolder) -> None:
    assert find_common_checkpoint(run, 0, CPU) is None
    write_checkpoints(run, 1, 2)
    assert find_common_checkpoint(run, 0, CPU) == run.checkpoint(2)
    (run.checkpoint(2) / "weights").write_text("3")
    assert find_common_checkpoint(run, 0, CPU) == run.checkpoint(1)
    assert [folder.name for folder in run.damaged_checkpoints()] == ["damaged_step_000002"]
    (run.checkpoint(1) / "weights").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint of the run is intact.*step_000001: weights is missing"):
        find_common_checkpoint(run, 0, CPU)
    assert run.checkpoint(1).is_dir()  # the last damaged checkpoint is not renamed


def test_a_checkpoint_trained_with_other_settings_is_refused_and_the_error_lists_all_differences(
    run: RunFolder,
) -> None:
    write_checkpoints(run, 1)
    file = run.read_run()

    def changed(**train: Any) -> RunFile:
        config = file.config.model_copy(update={"train": tiny_run(**train).train})
        return file.model_copy(update={"config": config})

    check_settings(run.checkpoint(1), changed(timeout_seconds=7, max_restarts=9, checkpoint_every=1))
    with pytest.raises(UserError) as caught:
        check_settings(run.checkpoint(1), changed(seed=1, optimizer={"lr": 0.5, "warmup_steps": 2}))
    assert caught.value.got == (
        "train.seed is 0 in the saved config, 1 in the run; "
        "train.optimizer.lr is 0.001 in the saved config, 0.5 in the run"
    )

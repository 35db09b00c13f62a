"""Tests that the work of the driver of a captioning job does not grow with the number of files."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.driver.caption import pending_files
from pipelines.driver.caption.pending_files import LISTING_SHARE, PendingFiles
from pipelines.driver.caption.run import MAX_TASKS, count_tasks


class Clock:
    """A monotonic clock. Each reading advances the clock by `step` seconds."""

    def __init__(self) -> None:
        self.now, self.step = 0.0, 0.0

    def read(self) -> float:
        self.now += self.step
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pending_files, "monotonic", clock.read)
    return clock


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("files", [3, 12])
def test_counting_the_progress_of_a_caption_job_reads_the_footer_of_each_parquet_file_only_once(
    tmp_path: Path, files: int
) -> None:
    pending = PendingFiles(tmp_path, {}, ("image_id", "image"))
    for number in range(files):
        pq.write_table(pa.table({"image_id": ["a", "b"]}), tmp_path / f"{number}.parquet")
    assert pending.num_rows() == 2 * files
    for number in range(files):
        (tmp_path / f"{number}.parquet").write_bytes(b"no footer")
    pq.write_table(pa.table({"image_id": ["c"]}), tmp_path / "new.parquet")
    assert pending.num_rows() == 2 * files + 1
    (tmp_path / "new.parquet").unlink()
    assert pending.num_rows() == 2 * files


def test_a_folder_whose_listing_takes_a_second_is_not_listed_again_for_twenty_seconds(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[float] = []
    files = PendingFiles.files

    def list_files(pending: PendingFiles) -> list[Path]:
        listed.append(clock.now)
        return files(pending)

    monkeypatch.setattr(PendingFiles, "files", list_files)
    pending = PendingFiles(tmp_path, {}, ("image_id", "image"))
    clock.step = 1
    for number in range(40):
        pq.write_table(pa.table({"image_id": ["a"]}), tmp_path / f"{number}.parquet")
        assert 0 < pending.num_rows() <= number + 1
    assert [later - earlier for earlier, later in pairwise(listed)] == [1 + 1 / LISTING_SHARE]
    clock.now += 1 / LISTING_SHARE
    assert pending.num_rows() == 40


@pytest.mark.parametrize(("rows", "cores", "tasks"), [(1, 2, 1), (512, 2, 2), (1025, 2, 4), (10**7, 16, MAX_TASKS)])
def test_a_caption_job_has_one_task_per_file_but_never_more_than_a_fixed_number_of_tasks(
    rows: int, cores: int, tasks: int
) -> None:
    assert count_tasks(rows, 512, cores) == tasks
    assert count_tasks(100 * rows, 512, 10_000) <= 10_000, "every core has a task"

"""Whatever is killed while a table is captioned: each row has one caption, and the one it would have had anyway."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import captioned
import pytest
from captioned import BAD, ROWS, found, prepare, work
from killed import Pace, Victim, kill_after, start, struck
from pyspark.sql import SparkSession

from pipelines.driver.caption.run import CaptionReport
from pipelines.errors import StageFailed
from pipelines.platform import Platform

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")


class Undisturbed(NamedTuple):
    """What a job leaves that nobody kills, of which folder, and in how many seconds: it is the first of its session."""

    folder: Path
    rows: list[dict[str, Any]]
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(spark: SparkSession, platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    prepare(folder := tmp_path_factory.mktemp("captioned"))
    begun = time.monotonic()
    work(spark, platform, folder, "undisturbed")
    seconds = time.monotonic() - begun
    rows = found(platform.root, folder, "undisturbed")
    assert len(rows) == ROWS
    assert sum(row["error"] is not None for row in rows) == BAD
    assert len({row["caption"] for row in rows}) > ROWS // 4, "captions that tell rows apart"
    return Undisturbed(folder, rows, seconds)


@pytest.fixture(scope="module")
def pace(undisturbed: Undisturbed) -> Pace:
    """Begins with what the first job took, more than a later one does."""
    return Pace(undisturbed.seconds)


def insist(spark: SparkSession, platform: Platform, folder: Path, version: str) -> CaptionReport:
    """Run it again until it ends green, as a job's retries do."""
    for _ in range(3):
        try:
            return work(spark, platform, folder, version)
        except StageFailed:
            continue
    return work(spark, platform, folder, version)


def survive(spark: SparkSession, platform: Platform, there: Undisturbed, victim: Victim, seed: int, pace: Pace) -> None:
    def job(attempt: str) -> tuple[str, CaptionReport]:
        version = f"{victim}-{seed}-{attempt}"
        return version, insist(spark, platform, there.folder, version)

    version, report = struck(victim, random.Random(seed), pace, job)
    assert report.considered == report.already + report.captioned + report.errors == ROWS
    assert found(platform.root, there.folder, version) == there.rows
    again = work(spark, platform, there.folder, version)
    assert (again.already, again.recovered) == (ROWS, 0)


@pytest.mark.faults
def test_each_row_has_its_caption_once_when_a_worker_is_killed(
    spark: SparkSession, platform: Platform, undisturbed: Undisturbed
) -> None:
    survive(spark, platform, undisturbed, "worker", 0, Pace(0.2 * undisturbed.seconds))


@pytest.mark.faults
@pytest.mark.matrix
@pytest.mark.parametrize("seed", range(1, 36))
@pytest.mark.parametrize("victim", ["worker", "executor"])
def test_each_row_has_its_caption_once_whenever_a_process_of_an_executor_is_killed(
    spark: SparkSession, platform: Platform, undisturbed: Undisturbed, victim: Victim, seed: int, pace: Pace
) -> None:
    survive(spark, platform, undisturbed, victim, seed, pace)


@pytest.mark.faults
@pytest.mark.matrix
@pytest.mark.parametrize("seed", range(10))
def test_each_row_has_its_caption_once_when_the_driver_is_killed_time_and_again(
    undisturbed: Undisturbed, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    (home := tmp_path / "home").mkdir()
    for _ in range(3):
        kill_after(start(captioned, home, undisturbed.folder), home, rng.uniform(0, undisturbed.seconds))
    assert start(captioned, home, undisturbed.folder).wait() == 0, (home / "log").read_text()[-3000:]
    assert found(home, undisturbed.folder, "1") == undisturbed.rows

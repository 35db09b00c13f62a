"""Tests of caption jobs whose processes are killed: each row gets the caption that an undisturbed job writes."""

from __future__ import annotations

import random
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import caption_job
import pytest
from caption_job import BAD, ROWS, caption_table, prepare, read_captions
from process_killer import KillWindow, ProcessKind, kill_after, retry, run_with_kills, start_script
from pyspark.sql import SparkSession

from pipelines.driver.caption.run import CaptionReport
from pipelines.platform import Platform

pytestmark = [
    pytest.mark.faults,
    pytest.mark.matrix,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the test finds processes in /proc"),
]


class Reference(NamedTuple):
    """Result of an undisturbed caption job: folder of the source table, captions, and duration in seconds."""

    folder: Path
    rows: list[dict[str, Any]]
    seconds: float


@pytest.fixture(scope="module")
def reference(spark: SparkSession, platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    prepare(folder := tmp_path_factory.mktemp("captioned"))
    started = time.monotonic()
    caption_table(spark, platform, folder, "reference")
    seconds = time.monotonic() - started
    rows = read_captions(platform.root, folder, "reference")
    assert len(rows) == ROWS
    assert sum(row["error"] is not None for row in rows) == BAD
    assert len({row["caption"] for row in rows}) > ROWS // 4, "captions differ between rows"
    return Reference(folder, rows, seconds)


@pytest.fixture(scope="module")
def window(reference: Reference) -> KillWindow:
    """Create the time window in which processes are killed, from the duration of an undisturbed caption job."""
    return KillWindow(reference.seconds)


def check_after_kill(
    spark: SparkSession, platform: Platform, reference: Reference, kind: ProcessKind, seed: int, window: KillWindow
) -> None:
    def job(attempt: str) -> tuple[str, CaptionReport]:
        version = f"{kind}-{seed}-{attempt}"
        return version, retry(partial(caption_table, spark, platform, reference.folder, version))

    version, report = run_with_kills(kind, random.Random(seed), window, job)
    assert report.considered == report.already + report.captioned + report.errors == ROWS
    assert read_captions(platform.root, reference.folder, version) == reference.rows
    again = caption_table(spark, platform, reference.folder, version)
    assert (again.already, again.recovered) == (ROWS, 0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["worker", "executor"])
def test_each_row_has_exactly_one_caption_after_executor_processes_are_killed_at_random_moments(
    spark: SparkSession, platform: Platform, reference: Reference, kind: ProcessKind, seed: int, window: KillWindow
) -> None:
    check_after_kill(spark, platform, reference, kind, seed, window)


@pytest.mark.parametrize("seed", range(3))
def test_each_row_has_exactly_one_caption_after_the_driver_is_killed_repeatedly(
    reference: Reference, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    (home := tmp_path / "home").mkdir()
    for _ in range(7):
        kill_after(start_script(caption_job, home, reference.folder), home, rng.uniform(0, reference.seconds))
    assert start_script(caption_job, home, reference.folder).wait() == 0, (home / "log").read_text()[-3000:]
    assert read_captions(home, reference.folder, "1") == reference.rows

"""Tests that no row is lost or duplicated if ingest or sharding is killed by SIGKILL."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import ingest_job
import pytest
from deltalake import DeltaTable
from ingest_job import SOURCE, ingest_and_shard, write_rows
from process_killer import KillWindow, ProcessKind, kill_after, retry, run_with_kills, start_script
from pyspark.sql import SparkSession

from pipelines.formats.shards import Shards
from pipelines.platform import Platform

pytestmark = [
    pytest.mark.faults,
    pytest.mark.matrix,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the test finds processes in /proc"),
]
ROWS = 60
DRIVER_SECONDS = 15.0
"""Length of the time window, in seconds, in which a driver is killed at a random moment. The window begins when the
driver's Spark session has started. A complete job takes about as long as the window.
"""


@pytest.fixture(scope="module")
def window() -> KillWindow:
    """Return a time window for kills that is longer than a job takes."""
    return KillWindow(60.0)


def assert_complete(home: Path, source: str, expected: dict[str, str]) -> None:
    """Check that `samples` or `quarantine` has every row exactly once, and that the newest shards have all pictures."""
    of_source = [("source", "=", source)]
    samples = DeltaTable(home / "warehouse" / "samples").to_pyarrow_table(filters=of_source).to_pylist()
    found = [(row["texts"][0]["text"], row["image"].hex()) for row in samples]
    assert sorted(found) == sorted(expected.items())
    assert all(len(row["texts"]) == 1 for row in samples)
    refused = DeltaTable(home / "warehouse" / "quarantine").to_pyarrow_table(filters=of_source).to_pylist()
    assert sorted(row["reason"] for row in refused) == ["bad_base64"] * (len(expected) // 10)
    folders = sorted((home / "shards").glob("*"), key=lambda folder: folder.stat().st_mtime)
    shards = Shards.open(folders[-1])
    assert shards.manifest.request.source == source
    assert shards.manifest.num_rows == len(expected)


def check_after_kill(
    spark: SparkSession, platform: Platform, source: str, folder: Path, kind: ProcessKind, seed: int, window: KillWindow
) -> None:
    expected = write_rows(folder, 1, ROWS)

    def job(attempt: str) -> str:
        retry(partial(ingest_and_shard, spark, platform, f"{source}-{attempt}", folder))
        return f"{source}-{attempt}"

    name = run_with_kills(kind, random.Random(seed), window, job)
    retry(partial(ingest_and_shard, spark, platform, name, folder))
    assert_complete(platform.root, name, expected)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["worker", "executor"])
def test_no_row_is_lost_or_duplicated_if_an_executor_or_its_worker_is_killed_at_random_moments(
    spark: SparkSession,
    platform: Platform,
    source: str,
    tmp_path: Path,
    kind: ProcessKind,
    seed: int,
    window: KillWindow,
) -> None:
    check_after_kill(spark, platform, source, tmp_path, kind, seed, window)


@pytest.mark.parametrize("seed", range(3))
def test_no_row_is_lost_or_duplicated_when_the_driver_is_killed_repeatedly(tmp_path: Path, seed: int) -> None:
    rng, expected = random.Random(seed), dict[str, str]()
    (home := tmp_path / "home").mkdir()
    for number in range(7):
        expected |= write_rows(tmp_path / "input", 1 + number * ROWS, ROWS)
        kill_after(start_script(ingest_job, home, tmp_path / "input"), home, rng.uniform(0, DRIVER_SECONDS))
    assert start_script(ingest_job, home, tmp_path / "input").wait() == 0, (home / "log").read_text()[-3000:]
    assert_complete(home, SOURCE, expected)


def test_each_row_is_written_once_when_two_processes_ingest_the_same_folder(tmp_path: Path) -> None:
    (home := tmp_path / "home").mkdir()
    expected = write_rows(tmp_path / "input", 1, ROWS)
    with ThreadPoolExecutor() as pool:
        codes = list(pool.map(lambda _: start_script(ingest_job, home, tmp_path / "input").wait(), range(2)))
    assert codes == [0, 0], (home / "log").read_text()[-3000:]
    assert_complete(home, SOURCE, expected)

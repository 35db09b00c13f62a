"""Tests of clocks that jump, and of little memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from home_commands import NEW_WORK, assert_one_paragraph, command, environment, report, start
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from open_sockets import command as command_of
from open_sockets import descendants
from rank_faults import wait_for
from shifted_clock import COMPILER, ShiftedClock

from pipelines.formats.run_folder import RunFolder
from pipelines.platform import sqlite_uri

pytestmark = [pytest.mark.faults, pytest.mark.matrix, pytest.mark.timeout(1500)]

HOUR, DAY = 3600, 86_400
WATCHFUL = ("spark.network.timeoutInterval=100ms", "spark.executor.heartbeatInterval=500ms")
"""Spark settings with which Spark notices a jump of the clock within a second, instead of a minute."""
MANY_ROWS = NEW_WORK["ingest"]
MORE_ROWS = ("ingest", "--set", "data.source.path=scenes:30:1")


def rows(home: Path, table: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = DeltaTable(home / "warehouse" / table).to_pyarrow_table().to_pylist()
    return found


def assert_complete(ingested: dict[str, Any]) -> None:
    """Assert that a report of an ingest accounts for each row that was read."""
    parts = (ingested[name] for name in ("new", "merged", "duplicates", "quarantined"))
    assert ingested["rows_in"] == sum(parts) > 0


def versions_of(home: Path) -> list[ModelVersion]:
    """Return all model versions in the registry of a home."""
    return list(MlflowClient(sqlite_uri(home / "mlflow.db")).search_model_versions())


# ------------------------------------------------------------------------------------------------ clocks that jump


@pytest.mark.skipif(COMPILER is None, reason="the library that shifts the clock needs gcc")
def test_a_clock_that_jumps_an_hour_back_and_a_day_ahead_loses_nothing_and_stops_no_stage(tmp_path: Path) -> None:
    clock, home = ShiftedClock.build(tmp_path / "clock"), tmp_path / "home"
    often = [word for setting in WATCHFUL for word in ("--set", f"platform.spark.conf.{setting}")]
    jumps = (0, -HOUR, DAY)

    with clock.jumping(jumps, every=2):
        first = report(["pipeline", *often], home, **clock.environment)
        second = train_twice(home, clock)
    assert first["rows_in"] == first["samples"] + first["duplicates"] + first["quarantined"]
    assert first["trained"]
    assert first["captions"] > 0 == first["errors"]

    clock.shift(DAY)
    more = report([*MORE_ROWS, *often], home, **clock.environment)
    assert_complete(more)
    assert_ahead(home)
    clock.shift(-HOUR)
    captioned = report(["caption", *often], home, **clock.environment)
    clock.shift(DAY)
    for options in ([], ["--keep", "1", "--remove"]):
        report(["maintain", *often, *options], home, **clock.environment)
    clock.shift(0)

    samples = rows(home, "samples")
    assert len(samples) == len({row["image_id"] for row in samples}) == first["samples"] + more["new"]
    assert captioned["considered"] == captioned["already"] + captioned["captioned"] == len(samples)
    assert report(MORE_ROWS, home)["rows_in"] == 0
    assert report(["caption"], home)["already"] == len(samples)
    assert {version.run_id for version in versions_of(home)} == {first["run_id"], second["run_id"]}
    for trained in (first, second):
        assert RunFolder(Path(trained["run_folder"])).finished_checkpoints()


def train_twice(home: Path, clock: ShiftedClock) -> dict[str, Any]:
    """Train, and start the same training a second time. The second start is refused, and the first training continues.

    Returns:
        JSON report that the first training has printed.
    """
    long = ["train", "--set", "train.seed=1", "--set", "train.steps=600", "--set", "train.log_every=1"]
    training = start(long, home, **clock.environment)
    wait_for(lambda: [*(home / "runs").glob("*/launcher.json")] != [], seconds=120)
    second = subprocess.run(
        command(*long), env=environment(home, **clock.environment), capture_output=True, text=True, check=False
    )
    assert_one_paragraph(second, "this run is already being trained")
    done = training.finish()
    assert done["trained"]
    assert (done["steps"], done["model_version"]) == (600, "2")
    times = [metrics.time for metrics in RunFolder(Path(done["run_folder"])).read_metrics()]
    assert max(times) - min(times) > DAY, "the ranks saw the jumps"
    return done


def assert_ahead(home: Path) -> None:
    """Assert that Python and the JVM wrote times of a clock that is a day ahead."""
    later = datetime.now(UTC) + timedelta(hours=12)
    assert max(row["ingested_at"] for row in rows(home, "samples")) > later
    (newest,) = DeltaTable(home / "warehouse" / "samples").history(1)
    assert newest["timestamp"] / 1000 > later.timestamp()


# ------------------------------------------------------------------------------------------------ memory


def test_the_error_says_that_the_java_process_of_spark_was_killed_and_the_next_command_completes_the_work(
    tmp_path: Path,
) -> None:
    """The kernel's OOM killer kills the process with the most memory, which is the JVM."""
    home = tmp_path / "home"
    home.mkdir()
    ingest = start(MANY_ROWS, home)
    wait_for(lambda: [*home.glob("staged/ingest-*")] != [], seconds=120)
    (jvm,) = (pid for pid in descendants(ingest.process.pid) if "SparkSubmit" in command_of(pid))
    os.kill(jvm, signal.SIGKILL)
    code = ingest.process.wait(60)
    killed = subprocess.CompletedProcess((), code, ingest.out.read_text(), ingest.log.read_text())
    assert_one_paragraph(killed, "the Java process of Spark has ended")
    assert "Got: it was killed by SIGKILL." in killed.stderr
    done = report(MANY_ROWS, home)
    assert_complete(done)
    assert (done["rows_in"], len(rows(home, "samples"))) == (400, done["new"])


def ingest_with_limit(home: Path, mib: int) -> subprocess.CompletedProcess[str]:
    """Run an ingest in which each process (driver, JVM, Python workers) may allocate `mib` MiB (`ulimit -d`)."""
    limited = ["sh", "-c", 'ulimit -d "$0" && exec "$@"', str(mib * 1024)]
    words = [*limited, *command("ingest", "--set", "platform.spark.master=local[2]")]
    home.mkdir()
    # The JVM writes a file of its own into the working folder if it gets too little memory.
    return subprocess.run(
        words, env=environment(home), cwd=home.parent, capture_output=True, text=True, check=False, timeout=600
    )


def test_an_ingest_works_with_two_gigabytes_of_memory_and_fails_with_one_paragraph_if_memory_is_too_little(
    tmp_path: Path,
) -> None:
    done = ingest_with_limit(tmp_path / "2048", 2048)
    assert done.returncode == 0, done.stderr
    assert_complete(json.loads(done.stdout))
    for mib in (1024, 600):  # the JVM ends during the ingest, or does not start
        assert_one_paragraph(ingest_with_limit(tmp_path / str(mib), mib), "too little memory")

"""Tests of several commands at the same time, and of commands on a machine with a jumping clock or little memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import maintain_often
import pytest
from deltalake import DeltaTable
from home_commands import NEW_WORK, assert_one_paragraph, command, environment, report, start
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from open_sockets import command as command_of
from open_sockets import descendants
from processes import TEST_PATH
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


# ------------------------------------------------------------------------------------------------ two homes


def versions_of(home: Path) -> list[ModelVersion]:
    """Return all model versions in the registry of a home."""
    return list(MlflowClient(sqlite_uri(home / "mlflow.db")).search_model_versions())


def runs_of(home: Path) -> set[str]:
    """Return the ids of all MLflow runs of a home."""
    client = MlflowClient(sqlite_uri(home / "mlflow.db"))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return {run.info.run_id for run in client.search_runs(experiments)}


def test_two_pipelines_that_run_at_the_same_time_in_two_homes_share_no_row_run_or_version(tmp_path: Path) -> None:
    homes = [tmp_path / name / "home" for name in ("first", "second")]
    for home in homes:
        home.mkdir(parents=True)
    running = [
        start(["pipeline", "--set", f"data.source.path=scenes:40:{seed}"], home) for seed, home in enumerate(homes)
    ]
    reports = [each.finish() for each in running]
    for home, other, done in zip(homes, reversed(homes), reports, strict=True):
        samples, captions = rows(home, "samples"), rows(home, "generated_captions")
        assert (len(samples), len(captions)) == (done["samples"], done["captions"])
        assert done["rows_in"] == done["samples"] + done["duplicates"] + done["quarantined"]
        assert not {row["sha256"] for row in samples} & {row["sha256"] for row in rows(other, "samples")}
        assert {row["image_id"] for row in captions} <= {row["image_id"] for row in samples}
        assert {row["run_id"] for row in captions} == {done["run_id"]}
        assert [(version.version, version.run_id) for version in versions_of(home)] == [("1", done["run_id"])]
        assert not runs_of(home) & runs_of(other)
        assert Path(done["run_folder"]).is_relative_to(home)
        files = [path for path in home.rglob("*") if path.is_file()]
        assert [str(path) for path in files if str(other.parent).encode() in path.read_bytes()] == []
    digests = [{row["model_digest"] for row in rows(home, "generated_captions")} for home in homes]
    assert len(digests[0]) == len(digests[1]) == 1
    assert digests[0] != digests[1]


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
    """Assert that the times that Python and the JVM have written are those of a clock that is a day ahead."""
    later = datetime.now(UTC) + timedelta(hours=12)
    assert max(row["ingested_at"] for row in rows(home, "samples")) > later
    (newest,) = DeltaTable(home / "warehouse" / "samples").history(1)
    assert newest["timestamp"] / 1000 > later.timestamp()


# ------------------------------------------------------------------------------------------------ maintain


@contextmanager
def maintained_often(home: Path) -> Iterator[Path]:
    """Run `lakesight maintain` again and again while the block runs. Yield the file with the reports."""
    stop, out, log = (home.parent / f"maintain.{name}" for name in ("stop", "out", "log"))
    with out.open("wb") as stdout, log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-P", maintain_often.__file__, str(stop)],
            env=environment(home, PYTHONPATH=TEST_PATH),
            stdout=stdout,
            stderr=stderr,
        )
    try:
        yield out
        stop.touch()
        assert process.wait() == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.mark.xdist_group("finished home")
def test_each_stage_succeeds_while_maintain_runs_again_and_again_and_nothing_that_is_needed_is_removed(
    finished_home: Path,
) -> None:
    before = len(rows(finished_home, "samples"))
    stages = NEW_WORK | {"evaluate": ("evaluate", "--set", "train.seed=1")}
    done: dict[str, dict[str, Any]] = {}
    with maintained_often(finished_home) as out:
        for stage in ("ingest", "shard", "train", "evaluate", "caption"):
            seen = len(out.read_text().splitlines())
            done[stage] = report(stages[stage], finished_home)
            print(f"{stage}: {len(out.read_text().splitlines()) - seen} maintenance commands ended")
    maintained = [json.loads(line) for line in out.read_text().splitlines()]
    assert sum(each["rewritten"] for report in maintained for each in report.get("tables", ())) > 0

    again = {stage: report(stages[stage], finished_home) for stage in done}
    ingested = done["ingest"]
    assert (
        ingested["rows_in"] == ingested["new"] + ingested["merged"] + ingested["duplicates"] + ingested["quarantined"]
    )
    assert len(rows(finished_home, "samples")) == before + ingested["new"]
    assert again["ingest"]["new"] == again["ingest"]["quarantined"] == 0
    assert all(split["reused"] for split in again["shard"].values())
    assert (done["train"]["trained"], again["train"]["trained"]) == (True, False)
    assert again["train"]["model_version"] == done["train"]["model_version"]
    assert again["evaluate"]["metrics"] == done["evaluate"]["metrics"]
    captioned = done["caption"]
    assert captioned["considered"] == captioned["already"] + captioned["captioned"]
    assert again["caption"]["already"] == captioned["considered"]


# ------------------------------------------------------------------------------------------------ memory


def test_the_error_says_that_the_java_process_of_spark_was_killed_and_the_next_command_completes_the_work(
    tmp_path: Path,
) -> None:
    """The test kills the JVM, as the kernel's OOM killer would: the JVM is the process with the most memory."""
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
    # With too little memory, the JVM itself writes an error report into the working folder.
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

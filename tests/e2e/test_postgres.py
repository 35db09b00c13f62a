"""Tests of teams that share an MLflow server, which stores runs in PostgreSQL and also serves the artifacts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from open_sockets import free_port
from postgres import Postgres, postgres_server
from tracking_server import tracking_server, wait_for_step

from pipelines.config import LocalPlatformConfig
from pipelines.errors import UserError
from pipelines.formats.run_folder import RunFolder
from pipelines.platform import Platform, local
from pipelines.tracking.outage import TrackingDown
from pipelines.tracking.registry import resolve
from pipelines.tracking.server import connect

pytestmark = [pytest.mark.faults, pytest.mark.matrix, pytest.mark.timeout(2400)]

STEPS = 80
SETTINGS = (
    "data.source.path=scenes:60:0",
    f"train.steps={STEPS}",
    "train.batch_size=16",
    "train.log_every=1",
    "train.validate_every=40",
    "train.checkpoint_every=40",
    "platform.ranks=1",
    "gate.baselines=[]",  # with these two settings, the gate accepts a model that ignores its pictures
    "gate.min_blind_gap=-10",
)


def at(platform: Platform, uri: str) -> Platform:
    return replace(platform, tracking_uri=uri, registry_uri=uri)


def test_a_wrong_password_or_database_name_is_an_error_but_a_stopped_database_server_is_an_outage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path / "home"))
    platform = local(LocalPlatformConfig())
    with postgres_server() as database:
        for uri in (database.uri(password="c4nary-wrong"), database.uri("no_such_database")):
            with pytest.raises(UserError, match="the tracking database cannot be used") as refused:
                connect(at(platform, uri))
            assert not isinstance(refused.value, TrackingDown)
            assert "c4nary" not in str(refused.value)
            assert "check host, port, user, password" in refused.value.fix
        database.kill()
        with pytest.raises(TrackingDown):
            connect(at(platform, database.uri()))


def start(person: Path, address: str) -> subprocess.Popen[str]:
    """Start the whole pipeline as one of several people, each of whom has a separate home folder."""
    person.mkdir()
    options = [word for setting in SETTINGS for word in ("--set", setting)]
    return subprocess.Popen(
        [sys.executable, "-P", "-c", "from jobs.cli import main; main()", "pipeline", "--json", *options],
        env=os.environ | {"LAKESIGHT_HOME": str(person / "home"), "MLFLOW_TRACKING_URI": address},
        cwd=person,
        stdout=subprocess.PIPE,
        stderr=(person / "log").open("w"),
        text=True,
    )


def run_of(person: Path, process: subprocess.Popen[str]) -> RunFolder:
    while not (found := list((person / "home" / "runs").glob("demo-*/run.json"))):
        assert process.poll() is None, (person / "log").read_text()
        time.sleep(0.5)
    return RunFolder(found[0].parent)


def test_two_pipelines_run_at_once_although_mlflow_and_postgresql_are_killed_and_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, people = free_port(), [tmp_path / name for name in ("ada", "bob")]
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path / "home"))
    with postgres_server() as database:
        with tracking_server(tmp_path, port, database.uri()):
            processes = [start(person, address) for person in people]
            for person, process in zip(people, processes, strict=True):
                wait_for_step(run_of(person, process), 2)
        restart(database)
        with tracking_server(tmp_path, port, database.uri()):
            reports = []
            for person, process in zip(people, processes, strict=True):
                printed, _ = process.communicate()
                assert process.returncode == 0, (person / "log").read_text()
                reports.append(json.loads(printed))
            platform = at(local(LocalPlatformConfig()), address)
            client = connect(platform)
            assert sorted(report["model_version"] for report in reports) == ["1", "2"]
            for report in reports:
                history = Counter(point.step for point in client.get_metric_history(report["run_id"], "train/loss"))
                assert history == Counter(range(1, STEPS + 1))
                assert client.get_run(report["run_id"]).info.artifact_uri.startswith("mlflow-artifacts:")
                assert report["captions"] > 0
            assert resolve(platform, "demo", "champion").version in ("1", "2")
    for person in people:
        assert "c4nary" not in (person / "log").read_text()


def restart(database: Postgres) -> None:
    database.kill()
    time.sleep(3)
    database.start()

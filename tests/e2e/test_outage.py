"""Tests that training starts and continues while the MLflow tracking server is down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from open_sockets import free_port
from processes import TEST_PATH
from tiny_runs import runs_in
from tracking_server import ended, is_healthy, last_step, tracking_server, wait_for_step

from pipelines.config import LocalPlatformConfig
from pipelines.formats.run_folder import RunFolder
from pipelines.platform import local
from pipelines.tracking import runs
from pipelines.tracking.registry import resolve
from pipelines.tracking.server import connect

STEPS = 600


@contextmanager
def rank_of(run: RunFolder) -> Iterator[subprocess.Popen[bytes]]:
    """Start a run that has a single rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "-m", "pipelines.worker.main"]
    environment = os.environ | {"PYTHONPATH": TEST_PATH, "OMP_NUM_THREADS": "1"}
    with (run.path / "rank.log").open("ab") as log:
        process = subprocess.Popen(
            [*command, "--run-dir", str(run.path)], stdout=log, stderr=log, env=environment, process_group=0
        )
    with ended(process):
        yield process


@pytest.mark.faults
@pytest.mark.matrix
def test_every_step_is_logged_once_if_the_tracking_server_is_killed_and_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path
) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    port = free_port()
    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path / "home"))
    run = runs_in(tmp_path, monkeypatch)(
        ranks=1, steps=STEPS, log_every=1, validate_every=200, checkpoint_every=200, batch_size=4
    )
    platform = replace(local(LocalPlatformConfig()), tracking_uri=f"http://127.0.0.1:{port}")
    config = run.read_run().config
    with ExitStack() as servers:
        server = servers.enter_context(tracking_server(tmp_path, port))
        with runs.follow(run, config, platform) as follower, rank_of(run) as rank:
            wait_for_step(run, 50)
            os.killpg(server.pid, signal.SIGKILL)
            without = last_step(run) + STEPS // 2
            wait_for_step(run, without)
            assert not is_healthy(port), "half of the steps ran without a server"
            servers.enter_context(tracking_server(tmp_path, port))
            assert rank.wait(timeout=300) == 0
        client = connect(platform)
        logged = client.get_run(follower.run_id)
        history = Counter(point.step for point in client.get_metric_history(follower.run_id, "train/loss"))
    assert history == Counter(range(1, STEPS + 1))
    assert logged.data.metrics == {
        key: value for metrics in run.read_metrics() for key, value in metrics.points.items()
    }
    assert logged.info.status == "FINISHED"


@pytest.mark.faults
@pytest.mark.matrix
def test_an_interrupted_training_ends_soon_although_the_tracking_server_no_longer_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    port = free_port()
    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    run = runs_in(tmp_path, monkeypatch)(ranks=1, steps=STEPS, log_every=1, batch_size=4)
    platform = replace(local(LocalPlatformConfig()), tracking_uri=f"http://127.0.0.1:{port}")
    with tracking_server(tmp_path, port) as server:

        def train() -> None:
            with runs.follow(run, run.read_run().config, platform):
                with rank_of(run):
                    wait_for_step(run, 50)
                    os.killpg(server.pid, signal.SIGSTOP)  # the server still accepts connections
                    wait_for_step(run, last_step(run) + 50)
                run.launcher.unlink()  # in `train`, the driver owns the run, but here torchrun's rank does
                interrupted.append(time.monotonic())
                raise KeyboardInterrupt

        interrupted: list[float] = []
        with pytest.raises(KeyboardInterrupt):
            train()
        # Without a shorter time limit, MLflow would try each request three times, and wait for two minutes each time.
        assert time.monotonic() - interrupted[0] < 110
        assert "could not be logged to MLflow" in caplog.text
        os.killpg(server.pid, signal.SIGCONT)


def folders_of_runs(home: Path) -> list[Path]:
    return [path.parent for path in (home / "runs").glob("*/run.json")]


SHORT = ("train.batch_size=16", "train.validate_every=20", "train.checkpoint_every=20", "train.log_every=1")
OPTIONS = [word for value in SHORT for word in ("--set", value)]
PICTURES = ["--set", "data.source.path=scenes:40:0"]


@pytest.mark.matrix
@pytest.mark.faults
def test_a_tracking_server_that_starts_after_the_training_gets_all_metrics_and_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path
) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    port, home = free_port(), tmp_path / "home"
    environment = os.environ | {"LAKESIGHT_HOME": str(home), "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    monkeypatch.setenv("LAKESIGHT_HOME", str(home))
    platform = replace(
        local(LocalPlatformConfig()), tracking_uri=f"http://127.0.0.1:{port}", registry_uri=f"http://127.0.0.1:{port}"
    )

    def start(command: str, *options: str) -> subprocess.Popen[str]:
        words = ["from jobs.cli import main; main()", command, "--json", *PICTURES, *options]
        return subprocess.Popen(
            [sys.executable, "-P", "-c", *words],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def check_logged(run_id: str, steps: int) -> None:
        client = connect(platform)
        history = Counter(point.step for point in client.get_metric_history(run_id, "train/loss"))
        assert history == Counter(range(1, steps + 1))
        assert client.get_run(run_id).info.status == "FINISHED"

    # The server is down from the start of the training to its end. The next command that needs the model registers the
    # model.
    ingest = start("ingest")
    assert ingest.wait() == 0, ingest.communicate()
    train = start("train", *OPTIONS, "--set", "train.steps=20")
    _, log = train.communicate()
    assert train.returncode == 1
    assert "training starts without MLflow" in log
    assert "training succeeded, but not all of it could be logged to MLflow" in log.splitlines()[-1]
    with tracking_server(tmp_path, port):
        evaluate = start("evaluate", *OPTIONS, "--set", "train.steps=20")
        report, log = evaluate.communicate()
        assert evaluate.returncode == 0, log
        version = resolve(platform, "demo", "latest")
        assert json.loads(report)["model_version"] == version.version == "1"
        check_logged(version.run_id, 20)

    # The server starts while the ranks train.
    train = start("train", *OPTIONS, "--set", "train.steps=60")
    while not (runs := [path for path in folders_of_runs(home) if not (path / "result.json").exists()]):
        assert train.poll() is None, train.communicate()
        time.sleep(0.5)
    wait_for_step(RunFolder(runs[0]), 2)
    with tracking_server(tmp_path, port):
        report, log = train.communicate()
        assert train.returncode == 0, log
        assert json.loads(report)["model_version"] == "2"
        check_logged(json.loads(report)["run_id"], 60)

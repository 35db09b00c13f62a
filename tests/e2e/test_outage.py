"""Tests that training continues while the MLflow tracking server is down."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from processes import TEST_PATH
from tiny_runs import runs_in

from pipelines.config import LocalPlatformConfig
from pipelines.formats.run_folder import RunFolder
from pipelines.platform import local
from pipelines.tracking import runs
from pipelines.tracking.server import connect

STEPS = 600


@contextmanager
def tracking_server(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start `mlflow server` in a separate process group. The server's database survives if the server is killed."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "kept")]
    with (
        (folder / "server.log").open("ab") as log,
        ended(subprocess.Popen(command, stdout=log, stderr=log, process_group=0)) as server,
    ):
        deadline = time.monotonic() + 120
        while not is_healthy(port):
            assert server.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.2)
        yield server


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


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a process, and kill the process and its children when the block ends."""
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except OSError:
        return False


def last_step(run: RunFolder) -> int:
    """Return the last step, taken from the names of the metric files: reading the files would slow the rank down."""
    return max((int(path.stem) for path in run.metrics(0).parent.glob("*.json")), default=0)


def wait_for_step(run: RunFolder, step: int) -> None:
    deadline = time.monotonic() + 240
    while last_step(run) < step:
        assert time.monotonic() < deadline, f"step {last_step(run)}"
        time.sleep(0.1)


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

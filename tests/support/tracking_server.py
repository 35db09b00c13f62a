"""An MLflow tracking server that tests start and kill, and functions that wait for a training run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.formats.run_folder import RunFolder


@contextmanager
def tracking_server(folder: Path, port: int, store: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """Start `mlflow server` in a separate process group. The server's database survives if the server is killed.

    Clients read and write artifacts through the server. `store` is the URI of the server's database; without `store`,
    the database is an SQLite file.
    """
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        store or f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "kept"),
    ]
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
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a process, and kill the process and its children when the block ends."""
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


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

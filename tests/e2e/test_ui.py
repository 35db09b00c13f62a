"""`lakesight ui`: the MLflow UI starts in any working folder, and ends completely."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from open_sockets import descendants, free_port, listeners
from processes import TEST_PATH, is_running

pytestmark = [pytest.mark.faults, pytest.mark.matrix]

SECONDS = 240
"""Longest time in which the server must answer."""


def test_modules_of_the_working_folder_do_not_shadow_those_of_the_mlflow_ui_and_sigterm_leaves_no_process(
    tmp_path: Path, empty_database: Path
) -> None:
    home, folder, port = tmp_path / "home", tmp_path / "work", free_port()
    home.mkdir()
    shutil.copy(empty_database, home / "mlflow.db")
    folder.mkdir()
    for name in ("platform", "config", "types", "mlflow", "vlm", "jobs"):
        (folder / f"{name}.py").write_text("raise ImportError(__file__)\n")
    command = [sys.executable, "-P", "-c", "from jobs.cli import main; main()", "ui", "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": TEST_PATH, "LAKESIGHT_HOME": str(home)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = wait_for_page(f"http://127.0.0.1:{port}/health", server)
            assert status == 200, (tmp_path / "log").read_text()
            started = descendants(server.pid)
            assert len(started) > 1
            assert all(listener.is_loopback for listener in listeners(started))
            server.terminate()
            assert server.wait(30) == 0
            assert not any(is_running(pid) for pid in started)
        finally:
            for pid in descendants(server.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            server.wait()


def wait_for_page(address: str, server: subprocess.Popen[bytes]) -> int | None:
    """Return the HTTP status of a page, or None if the server ends or does not answer in time."""
    limit = time.monotonic() + SECONDS
    while time.monotonic() < limit and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=10) as response:
                return int(response.status)
        except OSError:
            time.sleep(0.3)
    return None

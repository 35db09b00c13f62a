"""Tests of `lakesight ui`: the MLflow UI starts in any working folder and shows runs, and leaves no process behind."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from browser import CHROMIUM
from local_platforms import open_local
from open_sockets import descendants, free_port, listeners
from playwright.sync_api import sync_playwright
from processes import TEST_PATH, is_running
from tiny_runs import finish_run, tiny_run, write_run, write_shards

from pipelines.formats.run_folder import Metrics, write_json
from pipelines.platform import Platform
from pipelines.tracking.registry import describe_version, register
from pipelines.tracking.runs import follow, log_report
from pipelines.tracking.server import connect

pytestmark = [pytest.mark.faults, pytest.mark.matrix]

SECONDS = 240
"""Time limit for an answer of the server, in seconds."""


def test_the_mlflow_ui_imports_no_module_from_the_working_folder_and_leaves_no_process_after_sigterm(
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
            assert status_of(port, "GET", "/", Host=f"localhost:{port}") == 200
            for host in ("evil.example", "10.evil.example", f"192.168.evil.example:{port}"):
                assert status_of(port, "GET", "/", Host=host) == 403
            create = "/api/2.0/mlflow/experiments/create"
            assert status_of(port, "POST", create, Origin="http://evil.example") == 403
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


def status_of(port: int, method: str, path: str, **headers: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request(method, path, headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


@contextmanager
def serve(home: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """Serve the MLflow UI of a home folder. Yield the server's address and the address that the command prints."""
    port = free_port()
    command = [sys.executable, "-P", "-c", "from jobs.cli import main; main()", "ui", "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": TEST_PATH, "LAKESIGHT_HOME": str(home)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            assert wait_for_page(f"http://127.0.0.1:{port}/health", server) == 200, (folder / "log").read_text()
            while not (printed := re.findall(r"^ui +(http\S+)", (folder / "log").read_text(), re.M)):
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}", printed[0]
        finally:
            server.terminate()
            server.wait(60)


def write_training(home: Platform, folder: Path) -> tuple[str, str]:
    """Write, log and register a tiny run with training curves; return the ids of the MLflow run and the experiment."""
    shards = write_shards(folder / "shards", rows=6)
    run = write_run(folder / "runs" / "tiny-0123", tiny_run(), shards, shards)
    for step in range(0, 13, 2):
        values = {"train/loss": 2 - step / 10, "val/loss": 2.1 - step / 10, "val/blind_gap": step / 10}
        write_json(run.metrics(step), Metrics(step=step, time=1_700_000_000 + step, values=values))
    finish_run(run)
    with follow(run, tiny_run(), home) as follower:
        pass
    version = register(run, follower.run_id, home)
    describe_version(home, version, {"Evaluation": "On 6 pictures, the captions are better than the best constant."})
    figures: dict[str, list[object]] = {"metric": ["cider", "word_f1"], "value": [1.5, 0.5]}
    log_report(home, follower.run_id, "evaluate", {"test_cider": 1.5}, tables={"figures-0123.json": figures})
    return follower.run_id, connect(home).get_run(follower.run_id).info.experiment_id


@pytest.mark.parametrize("width", [1280, 360])
def test_the_mlflow_pages_of_a_run_and_of_a_model_version_explain_what_they_show(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    home = open_local(monkeypatch, tmp_path / "home", database=empty_database)
    run_id, experiment = write_training(home, tmp_path)
    view, name = "workflowType=machine_learning", "tiny on tiny, 12 steps, seed 0"
    with serve(home.root, tmp_path) as (server, printed), sync_playwright() as playwright:
        if CHROMIUM is None:
            pytest.skip("Chromium is not installed")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": width, "height": 1400})
        tab.set_default_timeout(SECONDS * 1000)

        def open_tab(address: str, text: str) -> str:
            tab.goto(address)
            # MLflow's pages load data all the time, so wait for a text, not for an idle network.
            tab.get_by_text(text).first.wait_for(state="attached")
            tab.screenshot(path=tmp_path / f"{re.sub(r'[^a-z]+', '-', text.lower())}-{width}.png")
            return " ".join(tab.inner_text("body").split())

        assert printed.startswith(server)
        assert "Model registry" in open_tab(printed, "lakesight/tiny"), "the page is not for model training"
        run_page = open_tab(f"{server}/#/experiments/{experiment}/runs/{run_id}?{view}", "Changed settings")
        assert name in run_page
        assert "lakesight train --run tiny" in run_page
        loaded = "image => image.complete && image.naturalWidth > 100"
        shown = tab.locator("img[src*='learning_curve.png']")
        shown.wait_for(state="attached")
        tab.wait_for_function(f"({loaded})(document.querySelector(\"img[src*='learning_curve.png']\"))")
        curves = open_tab(f"{server}/#/experiments/{experiment}/runs/{run_id}/model-metrics?{view}", "val(2)")
        assert curves.index("train (1)") < curves.index("val (2)"), "the page begins with other charts"
        assert "evaluate" not in curves
        assert "alias champion" in open_tab(f"{server}/#/models/tiny?{view}", "lakesight promote").replace("`", "")
        version_page = open_tab(f"{server}/#/models/tiny/versions/1?{view}", "best constant")
        assert f"Step 12 of the run {name}" in version_page
        browser.close()


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

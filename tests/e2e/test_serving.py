"""`mlflow models serve` on a registered version: a base64 picture in, a caption out, over REST."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_run, write_run, write_shards
from PIL import Image

from pipelines.config import LocalPlatformConfig
from pipelines.platform import Platform, local
from pipelines.rundir import Result, write_json
from pipelines.tracking import registry, runs
from pipelines.worker.caption import load_captioner
from vlm import text
from vlm.build import build_model
from vlm.checkpoint import save_model

CONFIG = tiny_run()


@pytest.fixture
def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Platform:
    """A home folder of its own, with its own registry."""
    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return local(LocalPlatformConfig())


@pytest.fixture
def version(laptop: Platform, tmp_path: Path) -> registry.ModelVersion:
    """A random model, registered."""
    shards = write_shards(tmp_path / "shards", rows=4)
    run = write_run(tmp_path / "runs" / "tiny-0123", CONFIG, shards, shards)
    tokenizer = text.load(run.tokenizer)
    torch.manual_seed(0)
    save_model(run.checkpoint(1), build_model(CONFIG.model, tokenizer.vocab_size), tokenizer)
    result = Result(status="ok", step=1, world_size=1, checkpoint=str(run.checkpoint(1)), metrics={}, seconds=1.0)
    write_json(run.result, result)
    with runs.follow(run, CONFIG, laptop) as run_id:
        pass
    return registry.register(run, run_id, laptop)


@pytest.fixture
def address(laptop: Platform, version: registry.ModelVersion, tmp_path: Path) -> Iterator[str]:
    """The address of a scoring server, started as the documentation says, in a folder without our code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", f"models:/{version.name}/1"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # as in an activated environment
    environment = os.environ | {"MLFLOW_TRACKING_URI": laptop.tracking_uri, "PATH": path}
    with (tmp_path / "serve.log").open("wb") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 240
        while not answers(f"http://127.0.0.1:{port}/ping"):
            said = (tmp_path / "serve.log").read_text(encoding="utf-8", errors="replace")
            assert server.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False


def ask(address: str, columns: list[str], rows: list[list[str]]) -> list[dict[str, Any]]:
    body = json.dumps({"dataframe_split": {"columns": columns, "data": rows}}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        predictions: list[dict[str, Any]] = json.load(response)["predictions"]
    return predictions


def test_a_served_version_captions_base64_pictures_over_rest(
    laptop: Platform, version: registry.ModelVersion, address: str
) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    captioner = load_captioner(str(registry.download(laptop, version)))
    (expected,) = captioner.caption([buffer.getvalue()], [""], CONFIG.model.generation)
    good = {"caption": expected.caption, "error": None}
    assert ask(address, ["image"], [[encoded]]) == [good]
    first, second, third = ask(address, ["image"], [[encoded], [f"data:image/png;base64,{encoded}"], ["%%%"]])
    assert first == second == good
    assert third["caption"] is None
    assert third["error"].startswith("bad_base64")
    (answer,) = ask(address, ["image", "prompt"], [[encoded, "what"]])
    assert answer["error"] is None


def test_a_loaded_version_runs_the_code_it_was_registered_with(
    laptop: Platform, version: registry.ModelVersion, tmp_path: Path
) -> None:
    """In an environment that has other versions of the packages installed: this one."""
    script = (
        f"import mlflow; mlflow.pyfunc.load_model('models:/{version.name}/1', dst_path=r'{tmp_path}')\n"
        "import sys; print([sys.modules[name].__file__ for name in ('vlm.model', 'pipelines.worker.caption')])"
    )
    environment = os.environ | {"MLFLOW_TRACKING_URI": laptop.tracking_uri}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(tmp_path)) == 2, done.stdout

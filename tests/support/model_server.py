"""Helpers that start `lakesight serve` for a registered model version, and send requests to the server in parallel."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from open_sockets import free_port
from PIL import Image
from processes import TEST_PATH
from tiny_runs import COLOURS, save_checkpoint, write_run, write_shards

from pipelines.config import RunConfig
from pipelines.formats.run_folder import Result, write_json
from pipelines.platform import Platform
from pipelines.tracking import registry, runs
from vlm import text
from vlm.factory import build_model

Answer = dict[str, Any]


class Serve(NamedTuple):
    """Command line and environment variables of `lakesight serve`."""

    command: list[str]
    environment: dict[str, str]


BAD = {"%%%": "bad_base64", base64.b64encode(b"no picture").decode(): "not_an_image", "": "missing_field"}
"""Dict from invalid pictures to the reason code in the server's answer."""


def register_random(platform: Platform, folder: Path, config: RunConfig) -> registry.ModelVersion:
    """Register a model that has random weights and the model config of a run."""
    shards = write_shards(folder / "shards", rows=4)
    run = write_run(folder / "runs" / "tiny-0123", config, shards, shards)
    tokenizer = text.load(run.tokenizer)
    torch.manual_seed(0)
    save_checkpoint(run.checkpoint(1), build_model(config.model, tokenizer.vocab_size), tokenizer)
    result = Result(status="ok", step=1, world_size=1, checkpoint=str(run.checkpoint(1)), metrics={}, seconds=1.0)
    write_json(run.result, result)
    with runs.follow(run, config, platform) as follower:
        pass
    return registry.register(run, follower.run_id, platform)


def serve_command(platform: Platform, version: registry.ModelVersion, folder: Path, port: int) -> Serve:
    """Write a run config for the model to the folder, and return command and environment for serving the version."""
    (folder / "conf" / "run").mkdir(parents=True, exist_ok=True)
    (folder / "conf" / "run" / f"{version.name}.yml").write_text("{model: nano, data: demo, train: demo}\n")
    command = [sys.executable, "-P", "-c", "from jobs.cli import main; main()", "serve", "--run", version.name]
    environment = os.environ | {"PYTHONPATH": TEST_PATH, "LAKESIGHT_HOME": str(platform.root)}
    environment |= {"MLFLOW_TRACKING_URI": platform.tracking_uri}
    return Serve([*command, "--version", version.version, "--port", str(port)], environment)


@contextmanager
def served(platform: Platform, version: registry.ModelVersion, folder: Path) -> Iterator[str]:
    """Run `lakesight serve` in a folder that does not contain our code, and yield the server's address."""
    port = free_port()
    command, environment = serve_command(platform, version, folder, port)
    with (folder / "serve.log").open("wb") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 240
        while not _answers(f"http://127.0.0.1:{port}/ping"):
            said = (folder / "serve.log").read_text(encoding="utf-8", errors="replace")
            assert server.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False


def ask(address: str, columns: Sequence[str], rows: Sequence[Sequence[str]], **headers: str) -> list[Answer]:
    """Send rows to the server and return one answer per row. If the whole request fails, HTTPError is raised."""
    body = json.dumps({"dataframe_split": {"columns": columns, "data": rows}}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json", **headers})
    with urllib.request.urlopen(request, timeout=120) as response:
        predictions: list[Answer] = json.load(response)["predictions"]
    return predictions


def picture_texts(side: int = 40) -> list[str]:
    """Return valid pictures as base64 texts, one picture per colour."""
    texts = []
    for colour in COLOURS.values():
        buffer = io.BytesIO()
        Image.new("RGB", (side, side * 3 // 4), colour).save(buffer, "PNG")
        texts.append(base64.b64encode(buffer.getvalue()).decode("ascii"))
    return texts


def load(address: str, requests: int, clients: int) -> list[float]:
    """Send requests from parallel clients, check every answer, and return the duration of each request in seconds.

    Each request has one to four rows. One fifth of all rows are invalid, and a request can contain both kinds of rows.
    """
    good = picture_texts()
    expected = {image: ask(address, ["image"], [[image]])[0] for image in good}
    assert all(answer["error"] is None for answer in expected.values())
    rows = [image for turn, bad in enumerate([*BAD] * 4) for image in (*(good[turn % 4 :] + good)[:4], bad)]

    def request(number: int) -> float:
        images = [rows[(3 * number + offset) % len(rows)] for offset in range(1 + number % 4)]
        started = time.monotonic()
        answers = ask(address, ["image"], [[image] for image in images])
        seconds = time.monotonic() - started
        for image, answer in zip(images, answers, strict=True):
            if image in expected:
                assert answer == expected[image]
            else:
                assert answer["caption"] is None
                assert answer["error"].startswith(BAD[image]), answer
        return seconds

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(request, range(requests)))

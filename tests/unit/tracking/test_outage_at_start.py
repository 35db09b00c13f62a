"""Tests that training starts while the tracking server is down, and that a server that refuses the user is an error."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from local_platforms import open_local
from tiny_runs import finish_run, log_step, tiny_run, write_run, write_shards

from jobs.common import Job, open_output
from jobs.lineage import run_lineage
from jobs.train import register_finished_runs, run_train
from pipelines.errors import StageFailed, UserError
from pipelines.formats.run_folder import Result, read_json, write_json
from pipelines.platform import Platform
from pipelines.tracking import registry, runs
from pipelines.tracking.download import download
from pipelines.tracking.outage import TrackingDown
from pipelines.tracking.server import connect
from vlm.checkpoint import load_config

CONFIG = tiny_run()


@pytest.fixture
def platform(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Platform:
    return open_local(monkeypatch, tmp_path / "home", database=empty_database)


@contextmanager
def answering(status: int, body: str) -> Iterator[str]:
    """Run an HTTP server that gives the same answer to every request, and yield the server's address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://me:c4nary@127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def at(platform: Platform, address: str) -> Platform:
    return replace(platform, tracking_uri=address, registry_uri=address)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")


def error_of(platform: Platform, address: str) -> UserError:
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        connect(at(platform, address))
    assert time.monotonic() - started < 10
    assert "\n" not in str(caught.value)
    assert "c4nary" not in str(caught.value)
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, "oops"),
        (502, "<h1>Bad gateway</h1>"),
        (503, '{"error_code": "TEMPORARILY_UNAVAILABLE", "message": "database is away"}'),
        (500, '{"error_code": "INTERNAL_ERROR", "message": "oops"}'),
    ],
)
def test_an_internal_error_of_the_server_counts_as_an_outage(platform: Platform, status: int, body: str) -> None:
    with answering(status, body) as address:
        assert isinstance(error_of(platform, address), TrackingDown)


@pytest.mark.parametrize(
    ("status", "body", "fix"),
    [
        (401, "You are not authenticated.", "MLFLOW_TRACKING_PASSWORD"),
        (403, '{"error_code": "PERMISSION_DENIED", "message": "no"}', "MLFLOW_TRACKING_TOKEN"),
        (404, "<h1>no such page</h1>", "correct MLFLOW_TRACKING_URI"),
        (405, "", "correct MLFLOW_TRACKING_URI"),
        (200, "<h1>please log in</h1>", "correct MLFLOW_TRACKING_URI"),
    ],
)
def test_an_answer_that_refuses_the_request_does_not_count_as_an_outage(
    platform: Platform,
    status: int,
    body: str,
    fix: str,
) -> None:
    with answering(status, body) as address:
        error = error_of(platform, address)
    assert not isinstance(error, TrackingDown)
    assert fix in error.fix


def test_a_server_that_gives_no_answer_counts_as_an_outage(platform: Platform) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert isinstance(error_of(platform, address), TrackingDown), "the port is closed"
        silent.listen()
        assert isinstance(error_of(platform, address), TrackingDown), "the server accepts, but does not answer"


@pytest.mark.parametrize(
    "address", ["http://no-such-host.invalid:5000", "http://127.0.0.1:port", "https://127.0.0.1:{}"]
)
def test_an_unknown_host_a_wrong_port_and_a_wrong_protocol_do_not_count_as_outages(
    platform: Platform, address: str
) -> None:
    with answering(200, "{}") as served:
        error = error_of(platform, address.format(served.rpartition(":")[2]))
    assert not isinstance(error, TrackingDown)


def test_training_starts_while_the_server_is_down_and_its_results_are_registered_later(
    platform: Platform,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runs, "DRAIN_SECONDS", 0.0)
    shards = write_shards(platform.root / "shards" / "tiny", rows=6)
    trained = write_run(platform.root / "runs" / "tiny-0123", CONFIG, shards, shards)
    down = at(platform, "http://127.0.0.1:9")
    trained.unregistered.touch()
    log_step(trained, 2)
    with pytest.raises(StageFailed, match="training succeeded, but not all"), runs.follow(trained, CONFIG, down):
        finish_run(trained)
    with open_output(as_json=True) as output:
        with pytest.raises(TrackingDown):
            register_finished_runs(Job(CONFIG, down, (), output))
        for opened, left in ((down, True), (platform, False)):
            assert trained.unregistered.exists()
            with pytest.raises(UserError, match="there is no table 'generated_captions'"):
                run_lineage(Job(CONFIG, opened, (), output), "an id")
            assert trained.unregistered.exists() == left
    assert not trained.unregistered.exists()
    version = registry.resolve(platform, "tiny", "1")
    assert [point.step for point in connect(platform).get_metric_history(version.run_id, "loss")] == [2]


def test_the_model_is_registered_later_with_the_settings_of_the_interrupted_command(
    platform: Platform,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shards = write_shards(platform.root / "shards" / "tiny", rows=6)
    trained = write_run(platform.root / "runs" / "tiny-0123", CONFIG, shards, shards)
    finish_run(trained)
    shutil.copytree(trained.checkpoint(12), trained.checkpoint(8))
    result = read_json(trained.result, Result).model_copy(update={"best_checkpoint": str(trained.checkpoint(8))})
    write_json(trained.result, result)
    monkeypatch.setattr("jobs.train.prepare_run", lambda job: trained)  # the run is finished and needs no shards
    generation = CONFIG.model.generation.changed({"num_beams": 3})
    wanted = CONFIG.model_copy(
        update={
            "model": CONFIG.model.model_copy(update={"generation": generation}),
            "train": CONFIG.train.model_copy(update={"register_": "best"}),
        }
    )
    with open_output(as_json=True) as output:
        with pytest.raises(TrackingDown):
            run_train(Job(wanted, at(platform, "http://127.0.0.1:9"), (), output))
        register_finished_runs(Job(CONFIG, platform, (), output))
        version = registry.resolve(platform, "tiny", "latest")
        assert (version.version, version.tags["checkpoint"]) == ("1", "step_000008")
        assert load_config(download(platform, version).folder).generation == generation
        trained.unregistered.touch()  # earlier releases wrote an empty file
        register_finished_runs(Job(CONFIG, platform, (), output))
    assert registry.resolve(platform, "tiny", "2").tags["checkpoint"] == "step_000012"
    assert not trained.unregistered.exists()


def test_an_unfinished_run_and_a_damaged_run_are_not_registered_and_do_not_stop_a_command(
    platform: Platform,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shards = write_shards(platform.root / "shards" / "tiny", rows=6)
    for name in ("tiny-1", "tiny-2"):
        write_run(platform.root / "runs" / name, CONFIG, shards, shards).unregistered.touch()
    (platform.root / "runs" / "tiny-2" / "run.json").write_text("{", encoding="utf-8")
    with open_output(as_json=True) as output:
        register_finished_runs(Job(CONFIG, platform, (), output))
    assert "tiny-2 is not registered" in capsys.readouterr().err
    with pytest.raises(UserError, match="there is no such registered model"):
        registry.resolve(platform, "tiny", "latest")


def test_the_error_for_a_registry_that_does_not_answer_does_not_contain_its_password(platform: Platform) -> None:
    with pytest.raises(StageFailed, match="the model registry did not answer a request") as caught:
        registry.resolve(replace(platform, registry_uri="http://me:c4nary@127.0.0.1:1"), "tiny", "1")
    assert "c4nary" not in str(caught.value)
    assert "run the command again when the registry answers" in caught.value.fix


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"])
@pytest.mark.parametrize("address", ["http://me:s3cret@[::1", "postgresql://[::1/db", "http://ex\u2100mple.invalid"])
def test_an_address_that_is_not_a_valid_uri_is_an_error_that_names_the_variable(
    platform: Platform, name: str, address: str
) -> None:
    is_registry = name == "MLFLOW_REGISTRY_URI"
    with pytest.raises(UserError, match="is not a valid URI") as caught:
        connect(replace(platform, registry_uri=address) if is_registry else replace(platform, tracking_uri=address))
    assert f"Where: {name}." in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("address", ["http://127.0.0.1:99999", "http://127.0.0.1:x", "http://a b/", "https:///x"])
def test_an_address_with_a_wrong_host_or_port_is_an_error_of_one_paragraph(platform: Platform, address: str) -> None:
    with pytest.raises(UserError, match="the MLflow tracking server cannot be used") as caught:
        connect(replace(platform, tracking_uri=address, registry_uri=address))
    assert "\n" not in str(caught.value)

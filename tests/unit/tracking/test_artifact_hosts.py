"""Tests of artifacts that are not on the tracking server: MLflow sends the server's credentials to no other host."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from local_platforms import open_local
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from open_sockets import free_port
from redirecting_server import redirecting_servers
from tracking_server import tracking_server

from pipelines.errors import StageFailed, UserError
from pipelines.platform import Platform
from pipelines.tracking.registry import ModelVersion, download_files, resolve
from pipelines.tracking.server import connect, refuse_foreign_hosts


@pytest.fixture
def foreign() -> Iterator[tuple[str, list[str]]]:
    """Run an HTTP server. Yield its host and port, and a list of the `Authorization` headers of all requests."""
    tokens: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            tokens.append(self.headers.get("Authorization", ""))
            self.send_error(404)

        do_PUT = do_POST = do_GET

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}", tokens
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.mark.parametrize("location", ["http://{}/x", "https://{}/x", "HTTP://{}/x", "mlflow-artifacts://{}/x"])
def test_no_request_is_sent_to_an_artifact_location_on_another_server(
    location: str, foreign: tuple[str, list[str]]
) -> None:
    refuse_foreign_hosts()
    host, tokens = foreign
    address = location.format(host)
    with pytest.raises(UserError, match="neither the tracking server nor the model registry") as caught:
        get_artifact_repository(address, tracking_uri="http://127.0.0.1:1").list_artifacts("")
    assert "\n" not in str(caught.value)
    assert tokens == []


def test_the_source_of_a_model_version_on_another_server_is_refused_before_a_request(
    foreign: tuple[str, list[str]], tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = open_local(monkeypatch, tmp_path / "home", database=empty_database)
    host, tokens = foreign
    client = connect(platform)
    client.create_registered_model("m")
    client.create_model_version("m", f"http://{host}/model")
    version = ModelVersion(name="m", version="1", run_id="", created_ms=0, tags={}, aliases=())
    with pytest.raises(UserError, match="neither the tracking server nor the model registry"):
        download_files(platform, version, tmp_path)
    assert tokens == []


@contextmanager
def registry_at(home: Platform, folder: Path, *, http: bool) -> Iterator[Platform]:
    """Yield the platform itself, or a platform whose registry is an MLflow server with the same database."""
    if not http:
        yield home
        return
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with tracking_server(folder, port, home.registry_uri):
        yield replace(home, tracking_uri=address, registry_uri=address)


@pytest.mark.parametrize("http", [False, pytest.param(True, marks=pytest.mark.matrix)])
def test_a_model_version_whose_source_is_not_a_valid_uri_is_an_error_of_one_paragraph(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch, http: bool
) -> None:
    home = open_local(monkeypatch, tmp_path / "home", database=empty_database)
    client = connect(home)
    client.create_registered_model("m")
    client.create_model_version("m", "http://127.0.0.1/model")
    with sqlite3.connect(home.root / "mlflow.db") as database:
        database.execute("UPDATE model_versions SET source = 'http://[::1', storage_location = 'http://[::1'")
    with registry_at(home, tmp_path, http=http) as platform:
        version = resolve(platform, "m", "1")
        with pytest.raises(StageFailed, match="does not name a valid URI") as caught:
            download_files(platform, version, tmp_path)
    assert "http://[::1: Invalid IPv6 URL" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_upload_to_an_experiment_whose_artifacts_are_on_another_server_is_refused_before_a_request(
    foreign: tuple[str, list[str]], tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(open_local(monkeypatch, tmp_path / "home", database=empty_database))
    host, tokens = foreign
    experiment = client.create_experiment("e", artifact_location=f"http://{host}/artifacts")
    run = client.create_run(experiment)
    with pytest.raises(UserError, match="neither the tracking server nor the model registry"):
        client.log_text(run.info.run_id, "text", "file.txt")
    assert tokens == []


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("user", ["", "me:s3cret@"])
def test_no_credentials_follow_a_redirection_of_the_tracking_server_to_another_host(
    status: int, user: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = open_local(monkeypatch, tmp_path / "home")
    with redirecting_servers(status) as servers:
        address = f"http://{user}{servers.host}"
        connect(replace(platform, tracking_uri=address, registry_uri=address))
        with suppress(MlflowException, OSError, ValueError):
            get_artifact_repository("mlflow-artifacts:/x", tracking_uri=address).list_artifacts("")
    assert len(servers.first) == len(servers.second) == 2
    assert all(servers.first), "the tracking server receives the credentials"
    assert servers.second == ["", ""]


def test_the_tracking_server_still_receives_its_own_requests_for_artifacts(
    foreign: tuple[str, list[str]],
) -> None:
    refuse_foreign_hosts()
    host, tokens = foreign
    served = f"http://{host}/api/2.0/mlflow-artifacts/artifacts/x"
    for location in (served, served.replace("http", "HTTP", 1), "mlflow-artifacts:/x", f"mlflow-artifacts://{host}/x"):
        with pytest.raises((MlflowException, OSError)):
            get_artifact_repository(location, tracking_uri=f"http://me@{host}").list_artifacts("")
    assert tokens == ["Bearer t0ken"] * 4

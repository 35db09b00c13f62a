"""Tests that the MLflow UI gets no credentials and accepts only loopback names as host.

The tests also check that the UI's command line does not contain the address of its database.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.server.security_utils import get_allowed_hosts_from_env, is_allowed_host_header
from open_sockets import free_port

from jobs.ui import ui, ui_environment
from pipelines.errors import StageFailed


def test_the_mlflow_ui_gets_the_address_of_its_database_in_its_environment_and_no_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other users of a machine can read the arguments of a process, but not its environment."""
    started: list[tuple[list[str], dict[str, str]]] = []

    def record(command: list[str], environment: dict[str, str], *_: object, **__: object) -> int:
        started.append((command, environment))
        return 1

    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path))
    monkeypatch.setattr("jobs.ui.run_server", record)
    uri = f"sqlite:///{tmp_path}/mlflow.db?password=c4nary"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for name in ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "DATABRICKS_TOKEN"):
        monkeypatch.setenv(name, "t0ken")
    with pytest.raises(StageFailed, match="the MLflow UI stopped"):
        ui(port=free_port())
    [(command, environment)] = started
    assert "c4nary" not in " ".join(command)
    assert environment["MLFLOW_BACKEND_STORE_URI"] == uri
    assert "t0ken" not in environment.values()


def test_the_mlflow_ui_accepts_only_the_names_of_the_loopback_device_as_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_SERVER_ALLOWED_HOSTS", raising=False)
    monkeypatch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", ui_environment("sqlite://")["MLFLOW_SERVER_ALLOWED_HOSTS"])
    allowed = get_allowed_hosts_from_env()
    assert allowed is not None
    for host in ("127.0.0.1", "127.0.0.1:5000", "localhost", "localhost:5000"):
        assert is_allowed_host_header(allowed, host)
    for host in ("evil.example", "10.evil.example", "192.168.evil.example:5000", "127.0.0.1.evil.example", ""):
        assert not is_allowed_host_header(allowed, host)
    monkeypatch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", "mine.example")
    assert ui_environment("sqlite://")["MLFLOW_SERVER_ALLOWED_HOSTS"] == "mine.example", (
        "the setting of the user counts"
    )

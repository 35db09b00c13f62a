"""Test that `lakesight ui` gives no credentials to the MLflow UI, and puts none on the UI's command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from open_sockets import free_port

from jobs.ui import ui
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

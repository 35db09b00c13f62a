"""Tests of the serving endpoint: the first call creates it, and later calls update it only for a new champion."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from databricks.sdk import WorkspaceClient
from databricks.sdk.errors import NotFound
from stand_in_workspace import Workspace, serve
from typer.testing import CliRunner

from jobs.cli import app
from jobs.endpoint import serve_version

MODEL = "main.vision.demo"


@pytest.fixture
def workspace() -> Workspace:
    return Workspace(user="somebody", versions={(MODEL, "1"), (MODEL, "2")})


@pytest.fixture
def client(workspace: Workspace) -> Iterator[WorkspaceClient]:
    with serve(workspace) as url:
        yield WorkspaceClient(host=url, token="stand-in")


def test_an_endpoint_is_created_once_and_is_updated_only_if_the_champion_has_changed(
    workspace: Workspace, client: WorkspaceClient
) -> None:
    changes = [serve_version(client, "captions", MODEL, version, f"digest of {version}") for version in ("1", "1", "2")]
    assert changes == [True, False, True]
    (served,) = workspace.endpoints["captions"]["config"]["served_entities"]
    assert (served["entity_name"], served["entity_version"]) == (MODEL, "2")
    assert served["scale_to_zero_enabled"] is True


def test_an_endpoint_is_updated_if_the_champion_has_the_same_number_but_other_files(
    workspace: Workspace, client: WorkspaceClient
) -> None:
    digests = ("first", "first", "trained again", "trained again", None, None)
    changes = [serve_version(client, "captions", MODEL, "1", digest) for digest in digests]
    assert changes == [True, False, True, False, True, False]
    (served,) = workspace.endpoints["captions"]["config"]["served_entities"]
    assert not served.get("environment_vars")


def test_an_endpoint_of_a_model_version_that_does_not_exist_is_refused(client: WorkspaceClient) -> None:
    with pytest.raises(NotFound, match="Version 3"):
        serve_version(client, "captions", MODEL, "3", None)


def test_the_error_of_command_endpoint_on_a_laptop_suggests_the_command_serve(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path_factory.mktemp("home")))
    done = CliRunner().invoke(app, ["endpoint"])
    assert done.exit_code != 0
    assert "lakesight serve --run demo" in str(done.exception)

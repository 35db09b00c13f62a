"""Tests of the serving endpoint: the first call creates it, and later calls update it only for a new champion."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from bundle import job_tasks
from databricks.sdk import WorkspaceClient
from databricks.sdk.errors import NotFound
from mlflow.protos.databricks_uc_registry_messages_pb2 import ModelVersion, RegisteredModel, RegisteredModelAlias
from stand_in_registry import READY
from stand_in_workspace import Workspace, mlflow_unchanged, serve
from typer.testing import CliRunner

from jobs.cli import app
from jobs.endpoint import serve_version

MODEL = "main.vision.demo"
ENDPOINT = "main-vision-demo"
GROUP = "captioners"
VALUES = {
    "var.catalog": "main",
    "var.endpoint_group": GROUP,
    "resources.schemas.lakesight.name": "vision",
    "resources.volumes.files.name": "files",
    "resources.experiments.runs.name": "/Shared/runs",
}


@pytest.fixture
def workspace() -> Workspace:
    return Workspace(user="somebody", groups={GROUP}, versions={(MODEL, "1"), (MODEL, "2")})


@pytest.fixture
def champion(workspace: Workspace, client: WorkspaceClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    """Let version 1 of the model be the champion, and let the commands use the workspace."""
    monkeypatch.setenv("DATABRICKS_HOST", client.config.host)
    monkeypatch.setenv("DATABRICKS_TOKEN", "stand-in")
    held = workspace.registry
    held.models[MODEL] = RegisteredModel(name=MODEL, aliases=[RegisteredModelAlias(alias="champion", version="1")])
    for number in "12":
        held.versions[MODEL, number] = ModelVersion(name=MODEL, version=number, status=READY)
    with mlflow_unchanged():
        yield workspace


def run_task(job: str, task: str, **parameters: str) -> str:
    """Run a task `endpoint` that the bundle deploys, and return what the task prints."""
    (arguments,) = [
        each
        for each in job_tasks(job, VALUES, parameters)
        if each[0] == "endpoint" and ("--if-exists" in each) == (task == "existing-endpoint")
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done
    return done.stdout


def served(workspace: Workspace) -> list[tuple[str, str]]:
    """Return the name and the served version of each endpoint."""
    return [
        (name, entity["entity_version"])
        for name, found in workspace.endpoints.items()
        for entity in found["config"]["served_entities"]
    ]


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


@pytest.mark.parametrize("job", ["rollback", "pipeline", "finetune"])
def test_the_jobs_let_an_existing_endpoint_serve_the_champion_but_create_no_endpoint(
    champion: Workspace, client: WorkspaceClient, job: str
) -> None:
    assert f"{ENDPOINT} does not exist" in run_task(job, "existing-endpoint")
    assert served(champion) == []
    serve_version(client, ENDPOINT, MODEL, "2", None)
    assert f"{MODEL} version 1" in run_task(job, "existing-endpoint")
    assert served(champion) == [(ENDPOINT, "1")]


def test_a_group_may_query_the_endpoint_and_permissions_that_others_have_remain(champion: Workspace) -> None:
    run_task("pipeline", "endpoint", serve="true")
    key = f"serving-endpoints/{champion.endpoints[ENDPOINT]['id']}"
    entry = {"group_name": GROUP, "permission_level": "CAN_QUERY"}
    assert champion.permissions == {key: [entry]}
    own = {"user_name": "somebody", "permission_level": "CAN_MANAGE"}
    champion.permissions[key] = [own]
    for _ in range(2):
        run_task("pipeline", "endpoint", serve="true")
        assert champion.permissions == {key: [own, entry]}


def test_the_name_of_an_endpoint_is_shortened_to_the_length_that_databricks_accepts(champion: Workspace) -> None:
    schema = "dev_somebody_with_a_long_name_" + "x" * 40
    held = champion.registry
    held.models[f"main.{schema}.demo"] = RegisteredModel(
        name=f"main.{schema}.demo", aliases=[RegisteredModelAlias(alias="champion", version="1")]
    )
    held.versions[f"main.{schema}.demo", "1"] = ModelVersion(name=f"main.{schema}.demo", version="1", status=READY)
    champion.versions.add((f"main.{schema}.demo", "1"))
    names = VALUES | {"resources.schemas.lakesight.name": schema}
    (*_, task) = job_tasks("pipeline", names, {"serve": "true"})
    done = CliRunner().invoke(app, [*task, "--json"])
    assert done.exit_code == 0, done
    assert [name for name, _ in served(champion)] == [json.loads(done.stdout)["endpoint"]]
    assert re.fullmatch(r"main-dev_somebody_with_a_long_name_x+-[0-9a-f]{16}", json.loads(done.stdout)["endpoint"])

"""Tests that the scheduled jobs of the bundle run in a simulated workspace that contains only the deployed resources.

In all processes, the stand-in for a Volume refuses the calls that a Databricks Volume refuses. The stand-in for MLflow
creates no parent folders of experiments. The distribution `mlflow` is hidden, because ML runtimes have the distribution
`mlflow-skinny` instead.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import pytest
import workspace_cluster
from bundle import job_tasks
from open_sockets import free_port
from processes import TEST_PATH
from stand_in_services import Json, Refused, node
from stand_in_workspace import Workspace, serve
from tracking_server import tracking_server
from volume import COMPILER, Volume

from jobs.generation_options import GENERATION_COMMANDS
from pipelines.scenes import write_scenes

SCHEMA, EXPERIMENT, GROUP = "fresh", "/Shared/lakesight/runs", "captioners"
VALUES = {
    "var.catalog": "spark_catalog",
    "resources.schemas.lakesight.name": SCHEMA,
    "resources.volumes.files.name": "files",
    "resources.experiments.runs.name": EXPERIMENT,
    "var.endpoint_group": GROUP,
}
SMALL = (
    *("platform.use_gpu=false", "train.steps=30", "train.batch_size=8", "train.validate_every=15"),
    *("train.checkpoint_every=15", "train.validate_rows=8", "train.optimizer.warmup_steps=5"),
    *("gate.baselines=[]", "gate.min_blind_gap=-10", "gate.max_error_share=1"),
)
"""Settings for a machine without GPUs. Training takes only 30 steps, so the promotion gate must accept a model that
ignores its pictures.
"""
SHORT = "model.generation.max_new_tokens=4"
"""Setting of the commands that caption pictures or train. Other commands refuse generation settings."""


class TrackingWorkspace(Workspace):
    """A workspace that checks the parent folder of an experiment, and forwards MLflow requests to a tracking server."""

    server = ""

    def answer(self, method: str, path: str, query: Json, body: bytes) -> object:
        if not path.startswith("/api/2.0/mlflow"):
            return super().answer(method, path, query, body)
        if path.endswith("experiments/create"):
            self.require_parent(node(json.loads(body)["name"]))
        url = f"{self.server}{path}?{urlencode(query)}"
        request = urllib.request.Request(url, body or None, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            found = json.loads(error.read())
            raise Refused(error.code, found["error_code"], found["message"]) from None


@dataclass
class FreshWorkspace:
    """A simulated workspace: its Volume, its URL, and the folder with the data of Unity Catalog and of clusters."""

    volume: Volume
    url: str
    home: Path
    services: Workspace

    def run(self, *tasks: list[str]) -> str:
        """Run tasks on a cluster and return what the tasks print to stdout."""
        login = {"DATABRICKS_HOST": self.url, "DATABRICKS_TOKEN": "stand-in", "PIP_INDEX_URL": f"{self.url}/simple/"}
        environment = os.environ | {"LAKESIGHT_HOME": str(self.home), "PYTHONPATH": TEST_PATH} | login
        command = [
            sys.executable,
            workspace_cluster.__file__,
            str(self.volume.folder),
            self.url,
            f"spark_catalog.{SCHEMA}",
        ]
        self.home.mkdir(exist_ok=True)
        done = subprocess.run(
            command,
            cwd=self.home,
            input=json.dumps(tasks),
            env=environment | self.volume.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def job(name: str, *settings: str, **parameters: str) -> list[list[str]]:
    """Return the parameters of each task of a deployed job, with additional settings for a small machine."""
    overrides = [f"--set={setting}" for setting in (*SMALL, *settings)]
    tasks = [[*task, *overrides] for task in job_tasks(name, VALUES, parameters)]
    return [[*task, f"--set={SHORT}"] if task[0] in GENERATION_COMMANDS else task for task in tasks]


@pytest.fixture
def workspace(tmp_path: Path, empty_database: Path) -> Iterator[FreshWorkspace]:
    volume = Volume.build(tmp_path / "volume", tmp_path / "build")
    write_scenes(volume.folder / "pictures" / "scenes.csv", 120, seed=0)
    found = TrackingWorkspace(user="1d0f-deployer", groups={GROUP})
    found.schemas[f"spark_catalog.{SCHEMA}"] = {}
    found.versions = {(f"spark_catalog.{SCHEMA}.demo", version) for version in "12"}
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    port = free_port()
    found.server = f"http://127.0.0.1:{port}"
    with tracking_server(tmp_path, port), serve(found) as url:
        yield FreshWorkspace(volume, url, tmp_path / "home", found)


@pytest.mark.skipif(COMPILER is None, reason="no gcc, which builds the stand-in for a Volume")
@pytest.mark.matrix
@pytest.mark.timeout(2400)
def test_all_jobs_of_the_bundle_run_twice_in_a_fresh_workspace_and_the_rollback_job_works(
    workspace: FreshWorkspace,
) -> None:
    folder = str(workspace.volume.folder / "pictures")
    rest = [*job("caption"), *job("maintain")]
    printed = workspace.run(*job("pipeline", source_path=folder, serve="true"), *rest)
    assert "version 1 is the champion now" in printed
    # All jobs run a second time, on a new cluster. This time, the config names the folder of pictures, and the job
    # parameter `source_path` is empty.
    in_config = f"data.source.path={folder}"
    scheduled = [*job("pipeline", in_config, serve="true"), *rest]
    # Then a longer training makes version 2 the champion, and a person starts the rollback job.
    longer = (in_config, "train.steps=40")
    again = workspace.run(*scheduled, *job("pipeline", *longer, serve="true"), *job("rollback"), *job("caption"))
    tasks = [part.partition("\n") for part in again.split("== ")[1:]]
    second = {name: text for name, _, text in tasks[: len(scheduled)]}
    assert second.keys() == {task[0] for task in scheduled}
    assert "nothing new" in second["ingest"]
    assert "nothing new" in second["caption"]
    assert "version 1 is already the champion" in second["promote"]
    assert "version 2 is the champion now" in again
    assert "version 1 is the champion again" in again
    assert "nothing new" in tasks[-1][2]
    assert workspace.volume.refused() == []
    (endpoint,) = workspace.services.endpoints.values()
    assert [served["entity_version"] for served in endpoint["config"]["served_entities"]] == ["1"]
    (access,) = workspace.services.permissions[f"serving-endpoints/{endpoint['id']}"]
    assert access == {"group_name": GROUP, "permission_level": "CAN_QUERY"}

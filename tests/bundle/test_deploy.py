"""Tests that the Databricks CLI deploys the bundle to a stand-in workspace.

The environment variable DATABRICKS_CLI contains the path of the CLI. Without this variable, the CLI is the binary
`databricks` on PATH. The deployed wheel is an almost empty archive, because a real build would download the build
backend.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from stand_in_workspace import Workspace, serve

from jobs.cli import app
from pipelines.config import load_run

ROOT = Path(__file__).parents[2]
CLI = os.environ.get("DATABRICKS_CLI") or shutil.which("databricks")
LAYOUT = ROOT / "dashboards" / "quality.lvdash.json"
TARGETS = ("dev", "staging", "prod")
ME = "1d0f-deployer"
VARIABLES = {
    "catalog": "main",
    "service_principal": ME,
    "readers": "analysts",
    "captioners": "operators",
    "run": "demo",
}
WHEEL = """
import os, zipfile
os.mkdir("dist")
zipfile.ZipFile("dist/lakesight-0.1.0-py3-none-any.whl", "w").writestr("lakesight.txt", "")
"""
APP_TABLES = {"samples": "SELECT", "generated_captions": "SELECT", "decisions": "SELECT", "verdicts": "MODIFY"}
RESOURCES = {"dev": 9, "staging": 15, "prod": 15}

pytestmark = pytest.mark.skipif(CLI is None, reason="no binary `databricks` on PATH, and DATABRICKS_CLI is not set")


class Deployment:
    """A copy of the bundle, and the workspace to which the copy is deployed."""

    def __init__(self, folder: Path, workspace: Workspace, url: str) -> None:
        self.folder, self.workspace, self.url = folder, workspace, url
        self.variables = {**VARIABLES, "build_wheel": shlex.join([sys.executable, "-c", WHEEL])}

    def run(self, command: str, target: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run `databricks bundle COMMAND -t TARGET` with the variables of the deployment and with additional
        variables.
        """
        assert CLI is not None
        values = {f"BUNDLE_VAR_{name}": value for name, value in (self.variables | variables).items()}
        path = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder.parent),
            "DATABRICKS_CLI_DO_NOT_EXECUTE_NEWER_VERSION": "1",
        }
        login = {"DATABRICKS_HOST": self.url, "DATABRICKS_TOKEN": "stand-in", "DATABRICKS_CACHE_ENABLED": "false"}
        line = [CLI, "bundle", *shlex.split(command), "-t", target]
        environment = path | login | values
        return subprocess.run(line, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)

    def expect(self, command: str, target: str, text: str) -> str:
        """Run a command, check that the command succeeds and prints the text, and return its stdout."""
        done = self.run(command, target)
        assert done.returncode == 0, done.stdout + done.stderr
        assert text in done.stdout + done.stderr
        return done.stdout

    def edit(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the settings in databricks.yml."""
        file = self.folder / "databricks.yml"
        settings = yaml.safe_load(file.read_text())
        change(settings)
        file.write_text(yaml.safe_dump(settings))


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    folder = tmp_path / "bundle"
    (folder / "jobs").mkdir(parents=True)
    shutil.copy(ROOT / "databricks.yml", folder)
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    for file in (ROOT / "jobs").glob("*.job.yml"):
        shutil.copy(file, folder / "jobs")
    workspace = Workspace(user=ME, groups={"analysts", "operators"})
    with serve(workspace) as url:
        yield Deployment(folder, workspace, url)


@pytest.mark.parametrize("target", TARGETS)
def test_the_databricks_cli_accepts_the_bundle_in_every_command_from_validate_to_destroy(
    deployment: Deployment, target: str
) -> None:
    count = RESOURCES[target]
    deployment.expect("validate --strict", target, "Validation OK!")
    deployment.expect("plan", target, f"Plan: {count} to add, 0 to change, 0 to delete, 0 unchanged")
    deployment.expect("deploy", target, f"Resources: {count} created, 0 changed, 0 deleted, 0 unchanged")
    deployment.expect("plan", target, f"Plan: 0 to add, 0 to change, 0 to delete, {count} unchanged")
    summary = json.loads(deployment.expect("summary --output json", target, "resources"))["resources"]
    workspace = deployment.workspace
    assert {job["name"] for job in workspace.jobs.values()} == {job["name"] for job in summary["jobs"].values()}
    assert len(workspace.jobs) == 5
    assert (len(workspace.schemas), len(workspace.volumes), len(workspace.experiments)) == (1, 1, 1)
    destroyed = deployment.run("destroy --auto-approve", target)
    left = [*workspace.jobs, *workspace.schemas, *workspace.volumes, *workspace.experiments]
    if target == "dev":
        assert (destroyed.returncode, left) == (0, []), destroyed.stderr
    else:
        assert destroyed.returncode == 1
        for protected in ("schemas.lakesight", "volumes.files", "experiments.runs"):
            assert f"resources.{protected} has lifecycle.prevent_destroy set" in destroyed.stderr
        assert len(left) == 8


def test_staging_and_prod_can_be_deployed_to_one_workspace_and_the_jobs_of_both_can_be_started(
    deployment: Deployment,
) -> None:
    for target in ("staging", "prod"):
        deployment.expect("deploy", target, "15 created")
        for run in ("demo", "emoji"):
            deployment.expect(f"run pipeline --no-wait --params run={run}", target, "")
    workspace = deployment.workspace
    assert len({job["name"] for job in workspace.jobs.values()}) == 10
    started = [(run["job_id"], run["job_parameters"]["run"]) for run in workspace.runs]
    assert sorted({run for _, run in started}) == ["demo", "emoji"]
    assert len(set(started)) == 4
    for job, run in started:
        settings = workspace.jobs[job]
        values = {entry["name"]: entry["default"] for entry in settings["parameters"]} | {"run": run}
        for task in settings["tasks"]:
            if "python_wheel_task" in task:
                check_command(task["python_wheel_task"]["parameters"], values)


def test_every_option_of_a_command_that_a_job_runs_can_be_given_as_a_job_parameter(deployment: Deployment) -> None:
    page = (ROOT / "docs" / "databricks.md").read_text()
    lines = re.findall(r"^databricks bundle (run) -t dev (.*options=.*)$", page, re.MULTILINE)
    (inline,) = re.findall(r"CSV file: `(--params [^`]*)`", page)
    commands = [*lines, ("run", f"caption {inline}")]
    deployment.expect("deploy", "dev", "created")
    for verb, rest in commands:
        deployment.expect(f"{verb} --no-wait {rest}", "dev", "")
    parsed = [parse_tasks(deployment.workspace, run) for run in deployment.workspace.runs]
    assert parsed[0]["caption"]["retry_errors"] is True
    assert parsed[0]["caption"]["image_root"] == "/Volumes/main/shop/photos"
    assert (parsed[1]["caption"]["version"], str(parsed[1]["caption"]["precision"])) == ("7", "bf16")
    assert "drift.fail=false" in parsed[1]["caption"]["overrides"]
    assert (parsed[2]["maintain"]["keep"], parsed[2]["maintain"]["remove"]) == (3, True)
    assert parsed[3]["ingest"]["refresh"] is True
    assert parsed[4]["caption"]["where"] == "source IN ('a', 'b')"


def parse_tasks(workspace: Workspace, run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the options of each task of a job run, as the real command line parses them."""
    job = workspace.jobs[run["job_id"]]
    values = {entry["name"]: entry["default"] for entry in job["parameters"]} | run["job_parameters"]
    wheels = {task["task_key"]: task["python_wheel_task"] for task in job["tasks"] if "python_wheel_task" in task}
    return {key: parse_command(wheel["parameters"], values) for key, wheel in wheels.items()}


def check_command(parameters: list[str], values: dict[str, str]) -> None:
    """Parse a deployed task's parameters with the real command line, and resolve the run config."""
    parsed = parse_command(parameters, values)
    assert load_run(parsed["run"], platform=parsed["platform"], overrides=parsed["overrides"]).name == values["run"]


def parse_command(parameters: list[str], values: dict[str, str]) -> dict[str, Any]:
    """Fill in the values of the job parameters, and return the options that the real command line parses."""
    filled = [re.sub(r"\{\{job\.parameters\.(\w+)\}\}", lambda match: values[match[1]], text) for text in parameters]
    filled = [text.replace("{{job.run_id}}", "1001") for text in filled]
    assert "${" not in "".join(filled)
    assert "{{" not in "".join(filled)
    command, *arguments = filled
    group = typer.main.get_command(app)
    return dict(group.commands[command].make_context(command, arguments).params)  # type: ignore[attr-defined]


@pytest.mark.parametrize("target", TARGETS)
def test_tasks_that_need_neither_gpus_nor_torch_run_on_serverless_compute_if_a_variable_is_set(
    deployment: Deployment, target: str
) -> None:
    page = (ROOT / "docs" / "databricks.md").read_text()
    (block,) = re.findall(r"```yaml\n(cpu_compute:.*?)```", page, re.DOTALL)
    deployment.edit(
        lambda settings: settings["targets"][target].setdefault("variables", {}).update(yaml.safe_load(block))
    )
    deployment.expect("validate --strict", target, "Validation OK!")
    deployment.expect("deploy", target, "created")
    for job in deployment.workspace.jobs.values():
        wheels = [task for task in job["tasks"] if "python_wheel_task" in task]
        serverless = {task["task_key"] for task in wheels if "job_cluster_key" not in task}
        assert serverless == {task["task_key"] for task in wheels} - {
            "import-weights",
            "train",
            "evaluate",
            "promote",
            "caption",
        }
    deployment.expect("plan", target, "0 to add, 0 to change, 0 to delete")


def include_ai_runtime(settings: dict[str, Any]) -> None:
    settings["include"].append("jobs/ai_runtime.yml")
    settings["sync"]["paths"].append("jobs/ai_runtime.sh")


@pytest.mark.parametrize("target", TARGETS)
def test_the_ai_runtime_job_is_deployed_only_if_the_bundle_includes_the_job_file(
    deployment: Deployment, target: str
) -> None:
    for name in ("ai_runtime.yml", "ai_runtime.sh"):
        shutil.copy(ROOT / "jobs" / name, deployment.folder / "jobs")
    deployment.edit(include_ai_runtime)
    deployment.expect("validate --strict", target, "Validation OK!")
    deployment.expect("deploy", target, "created")
    (job,) = [job for job in deployment.workspace.jobs.values() if "ai-runtime" in job["name"]]
    (ranks,) = [task["ai_runtime_task"] for task in job["tasks"] if "ai_runtime_task" in task]
    script = ranks["deployments"][0]["command_path"].removeprefix("/Workspace")
    assert deployment.workspace.nodes[script] == (ROOT / "jobs" / "ai_runtime.sh").read_bytes()
    for task in job["tasks"]:
        if "python_wheel_task" in task:
            check_command(task["python_wheel_task"]["parameters"], {"run": "demo"})


@pytest.mark.parametrize("target", TARGETS)
def test_an_included_dashboard_is_deployed_and_queries_the_schema_of_its_target(
    deployment: Deployment, target: str
) -> None:
    shutil.copytree(ROOT / "dashboards", deployment.folder / "dashboards")
    deployment.edit(lambda settings: settings["include"].append("dashboards/quality.yml"))
    deployment.variables["warehouse"] = "abc123"
    deployment.expect("validate --strict", target, "Validation OK!")
    deployment.expect("deploy", target, "created")
    (dashboard,) = deployment.workspace.dashboards.values()
    schema = deployment.workspace.schemas[f"main.{dashboard['dataset_schema']}"]
    assert (dashboard["warehouse_id"], dashboard["dataset_catalog"]) == ("abc123", schema["catalog_name"])
    deployed, written = (
        json.loads(text)["datasets"] for text in (dashboard["serialized_dashboard"], LAYOUT.read_text())
    )
    assert deployed == written
    deployment.expect("plan", target, "0 to add, 0 to change, 0 to delete")


def include_app(deployment: Deployment) -> None:
    """Add the review app to the bundle, as docs/databricks.md describes."""
    shutil.copytree(ROOT / "apps", deployment.folder / "apps", ignore=shutil.ignore_patterns("*.whl"))
    shutil.copy(ROOT / ".gitignore", deployment.folder)
    deployment.edit(lambda settings: settings["include"].append("apps/review.yml"))
    deployment.variables["warehouse"] = "abc123"


@pytest.mark.parametrize("target", TARGETS)
def test_an_included_review_app_is_deployed_with_the_wheel_and_started_with_the_permissions_it_needs(
    deployment: Deployment, target: str
) -> None:
    workspace = deployment.workspace
    deployment.expect("deploy", target, "created")
    (schema,) = workspace.schemas
    tables = {f"{schema}.{name}": level for name, level in APP_TABLES.items()}
    workspace.tables |= set(tables)
    include_app(deployment)
    deployment.expect("validate --strict", target, "Validation OK!")
    count = 1 if target == "dev" else 2  # the permissions of the app count as a resource
    deployment.expect("deploy", target, f"{count} created, 1 changed, 0 deleted")
    (app,) = workspace.apps.values()
    assert app["name"] == f"lakesight-review-{target}"
    deployment.expect("run review", target, "You can access the app at")
    started = workspace.apps[app["name"]]["active_deployment"]
    folder = started["source_code_path"].removeprefix("/Workspace")
    requirement = (ROOT / "apps" / "review" / "requirements.txt").read_text().splitlines()[-1]
    assert f"{folder}/{requirement.removeprefix('./').removesuffix('[review]')}" in workspace.nodes
    assert f"{folder}/requirements.txt" in workspace.nodes
    check_command(started["command"][1:], {"run": "demo"})
    held = {
        each["uc_securable"]["securable_full_name"]: each["uc_securable"]["permission"] for each in app["resources"][1:]
    }
    assert held == tables
    assert workspace.grants[schema][app["service_principal_client_id"]] == {"USE_SCHEMA"}
    users = [entry.get("group_name") for entry in workspace.permissions.get(f"apps/{app['name']}", [])]
    assert target == "dev" or {"operators", "analysts"} <= set(users)
    deployment.expect("plan", target, "0 to add, 0 to change, 0 to delete")


def test_a_review_app_without_tables_is_refused_with_the_name_of_a_table(deployment: Deployment) -> None:
    deployment.expect("deploy", "dev", "created")
    include_app(deployment)
    done = deployment.run("deploy", "dev")
    assert done.returncode == 1
    assert "does not exist" in done.stdout + done.stderr
    assert not deployment.workspace.apps


def test_a_second_deployment_with_a_different_catalog_deletes_nothing(deployment: Deployment) -> None:
    deployment.workspace.catalogs.add("other")
    deployment.expect("deploy", "prod", "15 created")
    done = deployment.run("deploy --auto-approve", "prod", catalog="other")
    assert done.returncode == 1
    assert "resources.schemas.lakesight has lifecycle.prevent_destroy set" in done.stderr
    assert list(deployment.workspace.schemas) == ["main.lakesight"]


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_deployment_without_a_required_variable_stops_before_it_changes_the_workspace(
    deployment: Deployment, variable: str
) -> None:
    del deployment.variables[variable]
    done = deployment.run("deploy", "prod")
    assert done.returncode == 1
    assert f"no value assigned to required variable {variable}" in done.stderr
    assert not deployment.workspace.schemas


def same_key(settings: dict[str, Any]) -> None:
    settings["resources"]["volumes"]["lakesight"] = settings["resources"]["volumes"].pop("files")


def missing_parent(settings: dict[str, Any]) -> None:
    settings["resources"]["experiments"]["runs"]["name"] = "/Shared/lakesight/runs"


def missing_table(settings: dict[str, Any]) -> None:
    trigger = {"table_update": {"table_names": ["main.lakesight.samples"]}}
    settings["variables"]["caption_trigger"]["default"] = trigger


def missing_folder(settings: dict[str, Any]) -> None:
    settings["variables"]["pipeline_trigger"]["default"] = {"file_arrival": {"url": "/Volumes/main/raw/pictures/"}}


REFUSALS: dict[str, tuple[Callable[[dict[str, Any]], object], dict[str, str], str]] = {
    "key": (same_key, {}, "defined with the same key: lakesight"),
    "parent": (missing_parent, {}, "The parent folder (/Shared/lakesight) does not exist"),
    "table": (missing_table, {}, "Table 'main.lakesight.samples' does not exist"),
    "folder": (missing_folder, {}, "The Volume of /Volumes/main/raw/pictures/ does not exist"),
    "catalog": (dict, {"catalog": "absent"}, "Catalog 'absent' does not exist"),
    "principal": (dict, {"readers": "nobody"}, "nobody"),
    "runtime": (dict, {"cpu_runtime": "18.0.x-cpu-ml-scala2.13"}, "Invalid spark version 18.0.x-cpu-ml-scala2.13"),
    "node": (dict, {"gpu_node": "absent"}, "Node type absent is not supported"),
}


@pytest.mark.faults
@pytest.mark.parametrize("fault", REFUSALS)
def test_the_command_fails_and_prints_the_reason_if_the_workspace_refuses_a_deployment(
    deployment: Deployment, fault: str
) -> None:
    change, variables, message = REFUSALS[fault]
    deployment.edit(change)
    done = deployment.run("deploy", "dev", **variables)
    assert done.returncode == 1
    assert message in done.stdout + done.stderr

"""Function that finds the settings of a job that a Databricks workspace refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stand_in_workspace import Workspace


def job_problem(settings: dict[str, Any], workspace: Workspace) -> str:
    """Return the first reason for which the workspace refuses the settings of a job, or an empty text."""
    return next(_problems(settings, workspace), "")


def _problems(settings: dict[str, Any], workspace: Workspace) -> Iterator[str]:
    clusters = {cluster["job_cluster_key"]: cluster["new_cluster"] for cluster in settings["job_clusters"]}
    keys = [task["task_key"] for task in settings["tasks"]]
    if len(set(keys)) < len(keys):
        yield f"Task keys are not unique: {keys}"
    for cluster in clusters.values():
        if cluster["spark_version"] not in workspace.runtimes:
            yield f"Invalid spark version {cluster['spark_version']}."
        if cluster["node_type_id"] not in workspace.node_types:
            yield f"Node type {cluster['node_type_id']} is not supported."
        if cluster.get("policy_id") == "":
            yield "Policy id is empty."
    for task in settings["tasks"]:
        if "ai_runtime_task" in task:
            yield from _ai_runtime_problems(task, settings, workspace)
            continue
        for need in task.get("depends_on", []):
            if need["task_key"] not in keys:
                yield f"Task {task['task_key']} depends on {need['task_key']}, which does not exist."
        if "condition_task" in task:
            continue
        yield from _compute_problems(task, settings, workspace)
    trigger = settings.get("trigger", {})
    for table in trigger.get("table_update", {}).get("table_names", []):
        if table not in workspace.tables:
            yield f"Table '{table}' does not exist."
    url = trigger.get("file_arrival", {}).get("url", "")
    if url.startswith("/Volumes/") and ".".join(url.split("/")[2:5]) not in workspace.volumes:
        yield f"The Volume of {url} does not exist."
    if "trigger" in settings and "schedule" in settings:
        yield "A job has either a schedule or a trigger."


def _compute_problems(task: dict[str, Any], settings: dict[str, Any], workspace: Workspace) -> Iterator[str]:
    """Yield the problems of a wheel task, which runs either on a job cluster or in an environment (serverless)."""
    libraries = [library["whl"] for library in task.get("libraries", [])]
    if ("job_cluster_key" in task) == ("environment_key" in task):
        yield f"Task {task['task_key']} needs either a job cluster or an environment."
    elif "job_cluster_key" in task:
        if task["job_cluster_key"] not in [cluster["job_cluster_key"] for cluster in settings["job_clusters"]]:
            yield f"Job cluster {task['job_cluster_key']} is not defined."
    else:
        environments = {each["environment_key"]: each["spec"] for each in settings.get("environments", [])}
        if task["environment_key"] not in environments:
            yield f"Environment {task['environment_key']} is not defined."
            return
        if libraries:
            yield f"Task {task['task_key']} runs on serverless compute, so its libraries belong into its environment."
        libraries = [each for each in environments[task["environment_key"]]["dependencies"] if each.endswith(".whl")]
    if not libraries:
        yield f"Task {task['task_key']} has no wheel."
    for library in libraries:
        if library.removeprefix("/Workspace") not in workspace.nodes:
            yield f"Library {library} does not exist."


def _ai_runtime_problems(task: dict[str, Any], settings: dict[str, Any], workspace: Workspace) -> Iterator[str]:
    environments = {each["environment_key"]: each["spec"] for each in settings["environments"]}
    if task["environment_key"] not in environments:
        yield f"Environment {task['environment_key']} is not defined."
    (deployment,) = task["ai_runtime_task"]["deployments"]
    for file in (deployment["command_path"], *environments[task["environment_key"]]["dependencies"]):
        if file.removeprefix("/Workspace") not in workspace.nodes:
            yield f"File {file} does not exist."
    compute = deployment["compute"]
    if compute["accelerator_count"] % int(compute["accelerator_type"].split("_")[1].split("x")[0]):
        yield f"The nodes of {compute['accelerator_type']} cannot have {compute['accelerator_count']} accelerators."

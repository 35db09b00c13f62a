"""Offline checks of the Databricks bundle: job types, references, clusters, parameters and schedules."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from databricks.bundles.jobs import Job, PythonWheelTask

from jobs.cli import app
from pipelines.config import available, load_run

ROOT = Path(__file__).parents[2]
BUNDLE: dict[str, Any] = yaml.safe_load((ROOT / "databricks.yml").read_text())
JOB_FILES = sorted((ROOT / "jobs").glob("*.job.yml"))
EXAMPLE = {
    "endpoint_group": "captioners",
    "catalog": "main",
    "ranks": "2",
    "run": "demo",
    "warehouse": "abc123",
    "resources.schemas.lakesight.name": "vision",
    "resources.volumes.files.name": "files",
    "resources.experiments.runs.name": "/Shared/[dev me] lakesight-dev",
}
CPU_COMPUTE = "${var.cpu_compute.%s}"
"""Setting of a task that needs neither a GPU nor torch, and that runs on a cluster or on serverless compute."""
REQUIRED = ("catalog", "service_principal", "readers", "captioners", "run")
"""Bundle variables without a default value. A deployment that lacks a value for one of these variables stops. With
default values, the deployment could use a wrong catalog, or train on the pictures of the demo.
"""


def read_job(file: Path) -> tuple[str, Any]:
    """Return the key and the settings of the job in a job file, which contains exactly one job."""
    content = yaml.safe_load(file.read_text())
    assert list(content) == ["resources"]
    assert list(content["resources"]) == ["jobs"]
    ((key, settings),) = content["resources"]["jobs"].items()
    return key, settings


JOBS = dict(map(read_job, JOB_FILES))
WITHOUT_RUN = ("import-weights",)
"""Commands that take neither the option --run nor the option --platform."""


def tasks() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """For every task that runs on a cluster, yield the job key, the task key and the task settings."""
    for key, job in JOBS.items():
        for task in job["tasks"]:
            if "condition_task" not in task:
                yield key, task["task_key"], task


def strings(node: Any) -> Iterator[str]:
    """Yield every string of a YAML document."""
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from strings(child)
    elif isinstance(node, str):
        yield node


def references(node: Any) -> set[str]:
    """Return the names in all ${...} references of a YAML document."""
    return {name for text in strings(node) for name in re.findall(r"\$\{([^}]+)\}", text)}


@pytest.mark.parametrize("file", JOB_FILES, ids=lambda file: file.name)
def test_every_job_file_defines_exactly_one_valid_job_and_the_job_has_the_name_of_the_file(file: Path) -> None:
    key, settings = read_job(file)
    assert file.name == f"{key}.job.yml"
    job = Job.from_dict(settings)
    assert job.as_dict().keys() == settings.keys()


def test_every_include_pattern_of_the_bundle_matches_files_and_every_job_file_is_included() -> None:
    found = [set(ROOT.glob(pattern)) for pattern in BUNDLE["include"]]
    assert all(found)
    assert set(JOB_FILES) == set().union(*found)


@pytest.mark.parametrize("key", JOBS)
def test_every_task_depends_on_existing_tasks_and_runs_on_an_existing_cluster(key: str) -> None:
    job = JOBS[key]
    names = [task["task_key"] for task in job["tasks"]]
    clusters = [cluster["job_cluster_key"] for cluster in job["job_clusters"]]
    assert len(set(names)) == len(names)
    for index, task in enumerate(job["tasks"]):
        assert {need["task_key"] for need in task.get("depends_on", [])} <= set(names[:index])
    default = BUNDLE["variables"]["cpu_compute"]["default"]["cluster"]
    used = {task["job_cluster_key"] for job_key, _, task in tasks() if job_key == key}
    assert {name.replace(CPU_COMPUTE % "cluster", default) for name in used} == set(clusters)


def test_every_variable_of_the_bundle_is_declared_and_used_and_has_a_value() -> None:
    declared = BUNDLE["variables"]
    used = {name.split(".")[1] for name in references([BUNDLE, JOBS]) if name.startswith("var.")}
    assert used == set(declared)
    assert {name for name, variable in declared.items() if "default" not in variable} == set(REQUIRED)
    for target in BUNDLE["targets"].values():
        assert set(target.get("variables", {})) <= set(declared)


def test_every_job_parameter_is_declared_and_used() -> None:
    for key, job in JOBS.items():
        used = set(re.findall(r"\{\{job\.parameters\.(\w+)\}\}", " ".join(strings(job["tasks"]))))
        assert used == {parameter["name"] for parameter in job["parameters"]}, key


def test_no_two_resources_of_the_bundle_have_the_same_resource_key() -> None:
    keys = [*JOBS, *(key for group in BUNDLE["resources"].values() for key in group)]
    assert sorted(keys) == sorted(set(keys))


def test_every_referenced_resource_exists_in_the_bundle() -> None:
    for name in references([BUNDLE, JOBS]):
        kind, _, rest = name.partition(".")
        if kind == "resources":
            group, key, field = rest.split(".")
            assert field in BUNDLE["resources"][group][key], name
        else:
            assert kind in ("var", "bundle") or name == "workspace.current_user.userName", name


@pytest.mark.parametrize("target", BUNDLE["targets"])
def test_the_number_of_ranks_in_every_bundle_target_is_divisible_by_the_number_of_workers(target: str) -> None:
    values = {name: variable.get("default") for name, variable in BUNDLE["variables"].items()}
    values |= BUNDLE["targets"][target].get("variables", {})
    assert values["ranks"] % values["workers"] == 0
    assert BUNDLE["targets"][target]["mode"] == "production" or values["run"] in available("run")
    for kind in ("gpu", "cpu"):
        assert re.fullmatch(rf"\d+\.(\d+\.)?x-{kind}-ml-scala2\.13", values[f"{kind}_runtime"])


def test_a_shared_deployment_belongs_to_one_service_principal_and_protects_its_data() -> None:
    for name, target in BUNDLE["targets"].items():
        if target["mode"] == "production":
            assert target["workspace"]["root_path"].startswith("/Workspace/Users/${var.service_principal}/"), name
            assert target["run_as"] == {"service_principal_name": "${var.service_principal}"}
            managers = [entry for entry in target["permissions"] if entry["level"] == "CAN_MANAGE"]
            assert managers == [{"service_principal_name": "${var.service_principal}", "level": "CAN_MANAGE"}]
            for group, resources in BUNDLE["resources"].items():
                for key in resources:
                    assert target["resources"][group][key]["lifecycle"]["prevent_destroy"] is True, (name, key)


@pytest.mark.parametrize("key", JOBS)
def test_every_job_begins_with_the_preflight_task_without_gpus_and_has_time_limits_and_notifications(
    key: str,
) -> None:
    job = JOBS[key]
    first, *others = job["tasks"]
    assert (first["task_key"], first["job_cluster_key"]) == ("preflight", CPU_COMPUTE % "cluster")
    assert all(task.get("depends_on") for task in others)
    assert job["timeout_seconds"] > job["health"]["rules"][0]["value"] > 0
    assert job["email_notifications"]["on_failure"] == "${var.notify}"
    assert job["budget_policy_id"] == "${var.budget_policy}"
    assert {cluster["new_cluster"]["policy_id"] for cluster in job["job_clusters"]} == {"${var.cluster_policy}"}


@pytest.mark.parametrize(("job", "name", "task"), tasks())
def test_every_task_calls_a_command_with_valid_options_and_settings(job: str, name: str, task: dict[str, Any]) -> None:
    wheel = PythonWheelTask.from_dict(task["python_wheel_task"])
    assert (wheel.package_name, wheel.entry_point) == ("lakesight", "lakesight")
    assert task["libraries"] in ([{"whl": "../dist/*.whl"}], CPU_COMPUTE % "libraries")
    parameters = defaults(JOBS[job])
    command, *arguments = [fill(text, parameters) for text in task["python_wheel_task"]["parameters"]]
    assert command == {"preflight": "doctor", "existing-endpoint": "endpoint"}.get(name, name)
    group = typer.main.get_command(app)
    parsed = group.commands[command].make_context(command, arguments).params  # type: ignore[attr-defined]
    if command in WITHOUT_RUN:
        assert parsed["model"] in available("model")
        return
    assert parsed["platform"] == "databricks"
    load_run(parsed["run"], platform=parsed["platform"], overrides=parsed["overrides"])


def defaults(job: dict[str, Any]) -> dict[str, str]:
    """Return the default values of a job's parameters, with the values of bundle variables in target `dev`."""
    values = {name: variable.get("default") for name, variable in BUNDLE["variables"].items()}
    values |= BUNDLE["targets"]["dev"]["variables"]
    variables = {f"${{var.{name}}}": str(value) for name, value in values.items()}
    return {entry["name"]: variables.get(entry["default"], entry["default"]) for entry in job["parameters"]}


def fill(text: str, parameters: dict[str, str]) -> str:
    """Replace each reference in a task parameter by an example value or by the value of a job parameter."""
    text = re.sub(r"\$\{(?:var\.)?([^}]+)\}", lambda match: EXAMPLE[match[1]], text)
    text = text.replace("{{job.run_id}}", "1001")
    return re.sub(r"\{\{job\.parameters\.(\w+)\}\}", lambda match: parameters[match[1]], text)


def test_each_developer_gets_a_separate_schema_and_experiment_through_bundle_references_in_the_tasks() -> None:
    for _, _, task in tasks():
        parameters = task["python_wheel_task"]["parameters"]
        if parameters[0] in WITHOUT_RUN:
            continue
        assert "--set=platform.schema=${resources.schemas.lakesight.name}" in parameters
        assert "--set=platform.volume=${resources.volumes.files.name}" in parameters
        assert "--set=platform.experiment=${resources.experiments.runs.name}" in parameters


@pytest.mark.parametrize("key", ["pipeline", "finetune"])
def test_every_training_rank_of_a_job_gets_a_whole_gpu(key: str) -> None:
    (cluster,) = [c for c in JOBS[key]["job_clusters"] if c["job_cluster_key"] == "gpu"]
    assert cluster["new_cluster"]["spark_conf"]["spark.task.resource.gpu.amount"] == "1"
    assert {task["job_cluster_key"] for _, name, task in tasks() if name == "train"} == {"gpu"}


def test_the_tasks_that_need_neither_gpus_nor_torch_run_on_the_compute_that_a_variable_names() -> None:
    movable = {name for _, name, task in tasks() if "environment_key" in task}
    assert movable == {"preflight", "ingest", "shard", "maintain", "rollback", "endpoint", "existing-endpoint"}
    for _, name, task in tasks():
        settings = [task.get(key) for key in ("job_cluster_key", "environment_key", "libraries")]
        expected = [CPU_COMPUTE % part for part in ("cluster", "environment", "libraries")]
        assert (settings == expected) == (name in movable), name
    assert {job["environments"] for job in JOBS.values()} == {CPU_COMPUTE % "environments"}


def test_the_review_app_calls_the_real_command_from_the_wheel_of_this_version_with_known_variables() -> None:
    settings = yaml.safe_load((ROOT / "apps" / "review.yml").read_text())
    app_settings = settings["resources"]["apps"]["review"]
    program, command, *arguments = [fill(text, {}) for text in app_settings["config"]["command"]]
    assert (program, command) == ("lakesight", "review")
    group = typer.main.get_command(app)
    parsed = group.commands[command].make_context(command, arguments).params  # type: ignore[attr-defined]
    load_run(parsed["run"], platform=parsed["platform"], overrides=parsed["overrides"])
    assert parsed["warehouse"] == EXAMPLE["warehouse"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wheel = f"./lakesight-{project['version']}-py3-none-any.whl[review]"
    assert wheel in (ROOT / "apps" / "review" / "requirements.txt").read_text().splitlines()
    used = {name.split(".")[1] for name in references(settings) if name.startswith("var.")}
    assert set(settings["variables"]) <= used <= {*settings["variables"], *BUNDLE["variables"]}


def test_the_rollback_task_is_never_retried_because_a_second_rollback_would_undo_the_first() -> None:
    (rollback,) = [task for _, name, task in tasks() if name == "rollback"]
    assert rollback.get("max_retries", 0) == 0


@pytest.mark.parametrize("key", ["pipeline", "finetune"])
def test_train_evaluate_and_promote_share_the_id_of_the_job_run_and_choose_no_version_themselves(key: str) -> None:
    stages = {
        name: task["python_wheel_task"]["parameters"]
        for job, name, task in tasks()
        if job == key and name in ("train", "evaluate", "promote")
    }
    assert len(stages) == 3
    for parameters in stages.values():
        assert [text for text in parameters if text.startswith(("--job-run", "--version", "--checkpoint"))] == [
            "--job-run={{job.run_id}}"
        ]


def test_every_schedule_is_a_valid_quartz_expression() -> None:
    schedules = [job["schedule"]["quartz_cron_expression"] for job in JOBS.values() if "schedule" in job]
    assert schedules
    for expression in schedules:
        assert quartz_problems(expression) == []


@pytest.mark.parametrize(
    "wrong", ["0 3 * * *", "0 0 3 * * *", "0 0 24 * * ?", "0 60 3 * * ?", "0 0 3 ? * ?", "0 0 3 * 13 ?"]
)
def test_a_cron_expression_that_quartz_would_refuse_is_reported(wrong: str) -> None:
    assert quartz_problems(wrong)


def quartz_problems(expression: str) -> list[str]:
    """Return the reasons for which Quartz would refuse a cron expression; the list is empty for a valid expression.

    A valid expression has six or seven fields, numbers in range, and `?` in exactly one of the two day fields.
    """
    ranges = [
        ("second", 0, 59),
        ("minute", 0, 59),
        ("hour", 0, 23),
        ("day", 1, 31),
        ("month", 1, 12),
        ("weekday", 1, 7),
    ]
    fields = expression.split()
    if len(fields) not in (6, 7):
        return [f"{len(fields)} fields"]
    problems = [] if (fields[3] == "?") != (fields[5] == "?") else ["exactly one of day and weekday is ?"]
    for (name, low, high), field in zip(ranges, fields, strict=False):
        problems += [f"{name} {n}" for n in re.findall(r"(?<!/)\b\d+", field) if not low <= int(n) <= high]
        if not re.fullmatch(r"[\d*?,/A-Z#L-]+", field) or ("?" in field and name not in ("day", "weekday")):
            problems.append(f"{name} {field!r}")
    return problems


# ------------------------------------------------------------------------------------------------ workflows


WORKFLOWS: dict[str, Any] = {
    file.stem: yaml.safe_load(file.read_text()) for file in (ROOT / ".github" / "workflows").glob("*.yml")
}


@pytest.mark.parametrize(("workflow", "job"), [("test", "validate"), ("deploy", "deploy")])
def test_workflows_set_every_required_variable_and_log_in_without_a_stored_secret(workflow: str, job: str) -> None:
    settings = WORKFLOWS[workflow]["jobs"][job]
    environment = settings["env"]
    variables = {name.removeprefix("BUNDLE_VAR_") for name in environment if name.startswith("BUNDLE_VAR_")}
    assert variables == set(REQUIRED)
    assert environment["DATABRICKS_AUTH_TYPE"] == "github-oidc"
    permissions = settings.get("permissions") or WORKFLOWS[workflow]["permissions"]
    assert permissions == {"contents": "read", "id-token": "write"}
    assert "secrets." not in (ROOT / ".github" / "workflows" / f"{workflow}.yml").read_text()


def test_pull_requests_run_the_test_command_and_validate_every_target() -> None:
    jobs = WORKFLOWS["test"]["jobs"]
    assert {"run": "make test"} in jobs["test"]["steps"]
    assert jobs["validate"]["strategy"]["matrix"]["target"] == list(BUNDLE["targets"])
    commands = [step["run"] for step in jobs["validate"]["steps"] if "run" in step]
    assert commands == ["databricks bundle validate --strict -t ${{ matrix.target }}"]


def test_workflows_pin_every_github_action_to_an_exact_version() -> None:
    steps = [step for workflow in WORKFLOWS.values() for job in workflow["jobs"].values() for step in job["steps"]]
    used = [step["uses"] for step in steps if "uses" in step]
    assert used
    assert [action for action in used if not re.fullmatch(r"[\w-]+/[\w-]+@v\d+\.\d+\.\d+", action)] == []


def test_the_finetune_job_equals_the_pipeline_job_except_that_it_trains_the_imported_checkpoint() -> None:
    own, pipeline = (
        {name: task["python_wheel_task"]["parameters"] for job, name, task in tasks() if job == key}
        for key in ("finetune", "pipeline")
    )
    assert "--out={{job.parameters.weights}}" in own.pop("import-weights")
    assert own.keys() == pipeline.keys() - {"endpoint"}
    assert {name: set(own[name]) - set(pipeline[name]) for name in own if own[name] != pipeline[name]} == {
        "train": {
            "--set=train.start_from={{job.parameters.weights}}",
            "--set=train.adapter.pattern={{job.parameters.adapter}}",
        }
    }

"""Tests of the checks of `lakesight doctor --platform databricks` against a stand-in workspace."""

from __future__ import annotations

import base64
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from bundle import job_tasks
from redirecting_server import redirecting_servers
from stand_in_workspace import Workspace, mlflow_unchanged, serve
from typer.testing import CliRunner

from jobs.check import DoctorCheck
from jobs.cli import LazyCommands, app
from jobs.doctor import run_checks, with_caption_options
from jobs.preflight import Inputs, check_mlflow, check_module, check_package_index, check_runtime, check_volume
from pipelines.config import RunConfig, load_run
from pipelines.errors import UserError
from pipelines.platform import open_platform
from pipelines.tracking import logged_model
from pipelines.tracking.server import connect, ensure_experiment

SETTINGS = ("platform.catalog=main", "platform.schema=vision", "platform.volume=files", "platform.ranks=2")
FREE_PORT = "http://127.0.0.1:9"


@pytest.fixture
def workspace(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    """Serve a workspace with an empty schema, and let MLflow use it."""
    workspace = Workspace(user="somebody")
    workspace.schemas["main.vision"] = {}
    monkeypatch.setenv("DATABRICKS_TOKEN", "stand-in")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with serve(workspace) as url, mlflow_unchanged():
        monkeypatch.setenv("DATABRICKS_HOST", url)
        yield workspace


def workspace_run(*overrides: str) -> RunConfig:
    return load_run("demo", platform="databricks", overrides=(*SETTINGS, *overrides))


def mlflow_checks(config: RunConfig) -> dict[str, DoctorCheck]:
    return {check.name: check for check in check_mlflow(config, open_platform(config.platform))}


def test_the_preflight_creates_the_experiment_its_folder_and_the_model_in_a_fresh_workspace(
    workspace: Workspace,
) -> None:
    config = workspace_run()
    for _ in range(2):
        checks = mlflow_checks(config)
        assert {name: check.status for name, check in checks.items()} == {"experiment": "ok", "model": "ok"}
    assert [each["name"] for each in workspace.experiments.values()] == ["/Shared/lakesight/demo"]
    assert set(workspace.registry.models) == {"main.vision.demo"}


def test_all_runs_of_a_deployment_share_the_experiment_of_the_deployment(workspace: Workspace) -> None:
    platform = open_platform(workspace_run("platform.experiment=/Shared/[dev me] runs").platform)
    for run in ("demo", "emoji", "ingest"):
        ensure_experiment(platform, run)
    assert [each["name"] for each in workspace.experiments.values()] == ["/Shared/[dev me] runs"]


@pytest.mark.parametrize(
    ("call", "check"), [("experiments/create", "experiment"), ("registered-models/create", "model")]
)
def test_the_preflight_check_fails_and_states_the_reason_if_mlflow_refuses_a_request(
    workspace: Workspace, call: str, check: str
) -> None:
    workspace.denied = {call}
    found = mlflow_checks(workspace_run())[check]
    assert found.status == "fail"
    assert "PERMISSION_DENIED" in found.found
    assert "grant" in found.fix
    assert "MLFLOW_TRACKING_URI" not in found.fix


def test_the_preflight_only_warns_about_a_tracking_server_that_does_not_answer(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", FREE_PORT)
    assert {check.status for check in mlflow_checks(load_run("demo")).values()} == {"warn"}


def test_the_preflight_outside_a_workspace_reports_the_runtime_and_volume_but_suggests_no_laptop_packages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jobs.preflight.RUNTIME_MODULES", ("no_such_module",))
    monkeypatch.delenv("DATABRICKS_RUNTIME_VERSION", raising=False)
    checks = run_checks(workspace_run())
    assert [check.name for check in checks if check.status == "fail"] == ["runtime", "no_such_module", "volume"]
    assert not [check for check in checks if "lakesight[local]" in check.fix]


def preflight_of_caption(options: str) -> list[str]:
    """Return the parameters of the first task of the job `caption`, if the job run has these options."""
    names = {"schemas.lakesight": "vision", "volumes.files": "files", "experiments.runs": "/Shared/runs"}
    values = {"var.catalog": "main"} | {f"resources.{key}.name": name for key, name in names.items()}
    given = {"table": "shop.files", "id_column": "sku", "image_column": "file", "where": "sku > '0'"}
    parameters, *_ = job_tasks("caption", values, given | {"options": options})
    return parameters


def checked_inputs(options: str) -> Inputs:
    """Return what this task checks."""
    command, *words = preflight_of_caption(options)
    parsed = LazyCommands()[command].make_context(command, words).params
    inputs = Inputs(None, *(parsed[name] for name in ("table", "id_column", "image_column", "where")))
    return with_caption_options(inputs, parsed["caption_options"])


def test_the_preflight_of_the_job_caption_knows_the_further_options_of_the_job() -> None:
    inputs = Inputs(None, "shop.files", "sku", "file", "sku > '0'")
    assert checked_inputs("") == inputs
    root = "/Volumes/main/shop/my photos"
    assert checked_inputs(f"--retry-errors --image-root '{root}'") == inputs._replace(image_root=root)
    assert checked_inputs("--where 'sku > 5'") == inputs._replace(where="sku > 5"), "as in the task caption"
    with pytest.raises(UserError, match="the options cannot be read"):
        checked_inputs("--where 'sku")
    refused = CliRunner().invoke(app, preflight_of_caption("--no-such-option"))
    assert (refused.exit_code, "No such option: --no-such-option" in refused.output) == (2, True)


@pytest.mark.parametrize(
    ("version", "status"),
    [("18.0", "ok"), ("17.3", "ok"), ("16.4", "fail"), ("client.4.9", "ok"), ("client.3.1", "fail"), ("other", "fail")],
)
def test_the_preflight_refuses_a_databricks_runtime_with_a_spark_version_below_4(version: str, status: str) -> None:
    found = check_runtime(version)
    assert found.status == status
    assert ("cpu_compute" in found.fix) == (version == "client.3.1")


def test_preflight_finds_a_module_whose_distribution_has_another_name() -> None:
    assert check_module("yaml", "").status == "ok"
    assert check_module("no_such_module", "do this") == DoctorCheck(
        name="no_such_module", status="fail", found="No module named 'no_such_module'", fix="do this"
    )


def test_the_preflight_tests_file_operations_in_the_volume_and_leaves_the_volume_empty(tmp_path: Path) -> None:
    assert check_volume(tmp_path).status == "ok"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("method", "step"), [("mkdir", "create a folder"), ("write_bytes", "write a file"), ("rename", "rename a file")]
)
def test_the_preflight_names_the_operation_that_the_volume_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, step: str
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, method, refuse)
    found = check_volume(tmp_path)
    assert (found.status, found.found) == ("fail", f"{tmp_path}: cannot {step}: Permission denied")


def test_the_preflight_names_a_volume_that_renames_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = Path.rename

    def only_files(path: Path, target: Path) -> Path:
        if path.is_dir():
            raise PermissionError(13, "Permission denied")
        return usual(path, target)

    monkeypatch.setattr(Path, "rename", only_files)
    found = check_volume(tmp_path)
    assert (found.status, found.found) == ("fail", f"{tmp_path}: cannot rename a folder: Permission denied")
    assert list(tmp_path.iterdir()) == []


def test_a_package_index_that_does_not_answer_is_named_without_its_password() -> None:
    found = check_package_index("http://user:secret@127.0.0.1:9/simple/")
    assert found.status == "warn"
    assert "127.0.0.1:9" in found.found
    assert "secret" not in found.found


def test_the_user_of_a_package_index_is_sent_to_the_index_and_not_to_the_target_of_a_redirection() -> None:
    with redirecting_servers() as servers:
        found = check_package_index(f"http://me:s%40cret@{servers.host}/simple/")
    assert (found.status, found.found) == ("ok", f"http://{servers.host}/simple/")
    assert servers.first == ["Basic " + base64.b64encode(b"me:s@cret").decode()]
    assert servers.second == [""]


@pytest.mark.parametrize("url", ["http://[::1", "http://127.0.0.1:x/", "simple"])
def test_the_check_warns_about_a_package_index_whose_address_is_not_a_valid_uri(url: str) -> None:
    assert check_package_index(url).status == "warn"


def test_the_version_of_mlflow_is_known_where_only_mlflow_skinny_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name == "mlflow":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert logged_model._public_version("mlflow") == mlflow.__version__
    assert logged_model._public_version("numpy") == installed("numpy")


def test_mlflow_connects_to_the_tracking_server_of_the_workspace_in_a_workspace(workspace: Workspace) -> None:
    assert connect(open_platform(workspace_run().platform)).search_experiments() == []

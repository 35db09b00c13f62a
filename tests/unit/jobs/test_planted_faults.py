"""Tests that the preflight finds each fault of a workspace, names the fault, and says how to correct it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
from unittest.mock import Mock, create_autospec

import pytest
from pyspark.errors import AnalysisException
from pyspark.sql import Row, SparkSession
from pyspark.sql.catalog import Catalog
from stand_in_workspace import Workspace, mlflow_unchanged, serve

from jobs.preflight import check_workspace
from pipelines.config import RunConfig, load_run
from pipelines.platform import Platform, open_platform

SETTINGS = ("platform.catalog=main", "platform.schema=vision", "platform.volume=files", "platform.ranks=2")
CREATED = {"version": 0, "operation": "CREATE TABLE", "operationMetrics": {}, "micros": 1}
HISTORY = [Row(**CREATED, userMetadata=None, operationParameters={})]


@dataclass
class Place:
    """A healthy workspace, in which a test plants a fault."""

    workspace: Workspace
    session: Mock
    platform: Platform
    config: RunConfig
    patch: pytest.MonkeyPatch

    def failures(self) -> dict[str, str]:
        """Run the preflight. Return what each failed check has found, and how to correct it."""
        checks = check_workspace(self.config, self.platform)
        return {check.name: f"{check.found}. Fix: {check.fix}" for check in checks if check.status == "fail"}


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Place]:
    workspace = Workspace(user="somebody")
    workspace.schemas["main.vision"] = {}
    session = create_autospec(SparkSession, instance=True)
    session.catalog = create_autospec(Catalog, instance=True)
    session.table.return_value.columns = []
    session.sql.return_value.selectExpr.return_value.collect.return_value = HISTORY
    config = load_run("demo", platform="databricks", overrides=SETTINGS)
    platform = replace(open_platform(config.platform), root=tmp_path, open_spark=lambda: session)
    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "18.0")
    monkeypatch.setenv("DATABRICKS_TOKEN", "stand-in")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with serve(workspace) as url, mlflow_unchanged():
        monkeypatch.setenv("DATABRICKS_HOST", url)
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple/")
        yield Place(workspace, session, platform, config, monkeypatch)


def refuse(place: Place, method: str) -> None:
    """Make a method of `Path` fail for paths in the Volume, as if the Volume refused the operation."""
    usual = getattr(Path, method)

    def refused(path: Path, *arguments: object, **more: object) -> object:
        if path.is_relative_to(place.platform.root):
            raise PermissionError(13, "Permission denied")
        return usual(path, *arguments, **more)

    place.patch.setattr(Path, method, refused)


def remove_module(place: Place, group: str) -> None:
    place.patch.setattr(f"jobs.preflight.{group}", ("no_such_module",))


def raise_from_spark(place: Place, message: str) -> None:
    place.session.catalog.tableExists.side_effect = AnalysisException(message)


def refuse_to_write(place: Place, table: str) -> None:
    """Refuse every change of the rows of a table."""
    usual = place.session.sql.return_value

    def answer(statement: str, *_: object) -> object:
        if statement.startswith(f"DELETE FROM {table} "):
            raise AnalysisException(f"[INSUFFICIENT_PERMISSIONS] User does not have MODIFY on Table '{table}'.")
        return usual

    place.session.sql.side_effect = answer


NO_CATALOG = "[NO_SUCH_CATALOG_EXCEPTION] Catalog 'main' was not found."
NO_GRANT = "[INSUFFICIENT_PERMISSIONS] User does not have CREATE TABLE on Schema 'main.vision'."


class Fault(NamedTuple):
    """A fault of a workspace: a function that plants the fault, the check that must fail, and a part of the check's
    message."""

    plant: Callable[[Place], object]
    check: str
    text: str


FAULTS = {
    "no workspace": Fault(
        lambda p: p.patch.delenv("DATABRICKS_RUNTIME_VERSION"), "runtime", "not a Databricks cluster"
    ),
    "an old runtime": Fault(lambda p: p.patch.setenv("DATABRICKS_RUNTIME_VERSION", "15.4"), "runtime", "15.4"),
    "no ML runtime": Fault(lambda p: remove_module(p, "RUNTIME_MODULES"), "no_such_module", "an ML runtime"),
    "no wheel": Fault(lambda p: remove_module(p, "WHEEL_MODULES"), "no_such_module", "the wheel of Lakesight"),
    "no Volume": Fault(lambda p: p.platform.root.rmdir(), "volume", "cannot create a folder: No such file"),
    "no write on the Volume": Fault(lambda p: refuse(p, "write_bytes"), "volume", "grant READ VOLUME and WRITE VOLUME"),
    "no rename on the Volume": Fault(lambda p: refuse(p, "rename"), "volume", "cannot rename a file"),
    "no catalog": Fault(lambda p: raise_from_spark(p, NO_CATALOG), "tables", "Catalog 'main' was not found"),
    "no grant": Fault(lambda p: raise_from_spark(p, NO_GRANT), "tables", "grant USE CATALOG, USE SCHEMA and CREATE"),
    "no experiment": Fault(lambda p: p.workspace.denied.add("experiments/create"), "experiment", "PERMISSION_DENIED"),
    "no model": Fault(lambda p: p.workspace.denied.add("registered-models/create"), "model", "PERMISSION_DENIED"),
    "no schema of models": Fault(lambda p: p.workspace.schemas.clear(), "model", "Schema 'main.vision' does not exist"),
    "no edit of the experiment": Fault(
        lambda p: p.workspace.denied.add("experiments/set-experiment-tag"), "experiment", "PERMISSION_DENIED"
    ),
    "no write to a table": Fault(
        lambda p: refuse_to_write(p, "main.vision.decisions"), "tables", "grant SELECT and MODIFY"
    ),
}


def test_the_preflight_reports_no_fault_in_a_healthy_workspace(place: Place) -> None:
    assert place.failures() == {}


def test_the_preflight_only_warns_about_a_package_index_that_this_cluster_did_not_need(place: Place) -> None:
    place.workspace.denied.add("/simple/")
    assert place.failures() == {}
    (index,) = [check for check in check_workspace(place.config, place.platform) if check.name == "index"]
    assert index.status == "warn"
    assert "allow egress to the package index" in index.fix


def test_the_preflight_reports_no_fault_on_serverless_compute_without_torch(place: Place) -> None:
    place.patch.setenv("DATABRICKS_RUNTIME_VERSION", "client.4.9")
    place.patch.setitem(sys.modules, "torch", None)
    assert place.failures() == {}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_preflight_reports_exactly_the_fault_that_was_planted(place: Place, fault: str) -> None:
    planted = FAULTS[fault]
    planted.plant(place)
    failures = place.failures()
    assert list(failures) == [planted.check], failures
    assert planted.text in failures[planted.check]

"""Tests of the model registry with MLflow's own client for Unity Catalog, against a stand-in workspace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from local_platforms import open_local
from mlflow.protos.databricks_uc_registry_messages_pb2 import ModelVersion, RegisteredModel
from stand_in_registry import PENDING, READY
from stand_in_workspace import Workspace, mlflow_unchanged, serve
from tiny_runs import finish_run, tiny_run, write_run, write_shards

from pipelines.errors import LakesightError, UserError
from pipelines.formats.run_folder import RunFolder, read_json
from pipelines.platform import Platform
from pipelines.tracking import aliases, registry, runs
from pipelines.tracking.download import download, download_checked, needed_checkpoints
from pipelines.tracking.logged_model import MODEL_FILES
from vlm.config import GenerationConfig

SCHEMA = "main.vision"
NAME = f"{SCHEMA}.tiny"


@dataclass
class Catalog:
    """A platform whose model registry is a stand-in for Unity Catalog, and a finished run whose MLflow run is local."""

    workspace: Workspace
    platform: Platform
    run: RunFolder

    def add_versions(self, count: int) -> list[registry.ModelVersion]:
        """Add complete versions without files, which no training run has registered."""
        held = self.workspace.registry
        held.models[NAME] = RegisteredModel(name=NAME)
        for number in map(str, range(1, count + 1)):
            held.versions[NAME, number] = ModelVersion(name=NAME, version=number, status=READY)
        return [registry.resolve(self.platform, NAME, number) for number in map(str, range(1, count + 1))]

    def register(self, tokens: int | None = None) -> registry.ModelVersion:
        """Register the checkpoint of the run, with another setting of `max_new_tokens` if `tokens` is not None."""
        generation = None if tokens is None else GenerationConfig(max_new_tokens=tokens)
        run_id = read_json(self.run.tracking, runs.Tracking).run_id
        return registry.register(self.run, run_id, self.platform, generation=generation)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    """Write a finished run into a home folder, and log the run to the folder's MLflow database. Return the folder."""
    home = tmp_path_factory.mktemp("home")
    config, shards = tiny_run(), write_shards(home / "shards", rows=6)
    run = write_run(home / "runs" / "tiny-0123", config, shards, shards)
    finish_run(run)
    with pytest.MonkeyPatch.context() as patch, mlflow_unchanged():
        patch.delenv("MLFLOW_REGISTRY_URI", raising=False)
        with runs.follow(run, config, open_local(patch, home, database=empty_database)):
            pass
    return home


@pytest.fixture
def catalog(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Catalog]:
    workspace = Workspace(user="somebody")
    workspace.schemas[SCHEMA] = {}
    monkeypatch.setenv("DATABRICKS_TOKEN", "stand-in")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with serve(workspace) as url, mlflow_unchanged():
        monkeypatch.setenv("DATABRICKS_HOST", url)
        monkeypatch.setenv("MLFLOW_REGISTRY_URI", "databricks-uc")
        platform = replace(open_local(monkeypatch, finished), model_prefix=f"{SCHEMA}.")
        yield Catalog(workspace, platform, RunFolder(finished / "runs" / "tiny-0123"))


def test_versions_are_registered_once_found_downloaded_and_described(catalog: Catalog, tmp_path: Path) -> None:
    first = catalog.register()
    assert catalog.register() == first, "the same checkpoint is registered only once"
    second = catalog.register(tokens=5)
    assert [version.version for version in (first, second)] == ["1", "2"]
    platform = catalog.platform
    assert registry.resolve(platform, NAME, "latest") == second
    assert needed_checkpoints(platform)(catalog.run) == {"step_000012"}
    for version in (first, second):
        assert {path.name for path in download(platform, version).folder.iterdir()} >= set(MODEL_FILES)
    assert (download_checked(platform, first, tmp_path) / "MLmodel").is_file()
    tagged = registry.tag(platform, first, {"gate.val/f1": " x" * 1000, "cost-centre": "7"})
    assert tagged.tags["cost_centre"] == "7"
    assert len(tagged.tags["gate_val_f1"]) <= registry.MAX_TAG_CHARS
    trained = {key for key in tagged.tags if key.startswith("training_")}
    assert trained == {"training_val_loss", "training_val_blind_gap"}, "a version may have only 50 tags"
    registry.describe_version(platform, first, {"Evaluation": "good"})
    assert "good" in catalog.workspace.registry.versions[NAME, "1"].description


def test_aliases_move_forwards_and_back(catalog: Catalog) -> None:
    platform = catalog.platform
    first, second, _ = catalog.add_versions(3)
    assert aliases.find_champion(platform, NAME) is None
    assert aliases.promote(platform, first).aliases == ("champion",)
    registry.set_alias(platform, second, aliases.CHALLENGER)
    assert aliases.promote(platform, second).aliases == ("champion",)
    assert registry.resolve(platform, NAME, "previous").version == "1"
    planned = aliases.plan_rollback(platform, NAME)
    assert planned is not None
    aliases.move_aliases(platform, NAME, planned)
    champion = aliases.find_champion(platform, NAME)
    assert champion is not None
    assert (champion.version, champion.aliases) == ("1", ("champion",))
    assert list(catalog.workspace.registry.models[NAME].tags) == []


@pytest.mark.parametrize("code", registry.ALREADY_EXISTS)
def test_a_model_that_another_client_has_created_meanwhile_is_used(catalog: Catalog, code: str) -> None:
    catalog.workspace.registry.code_of_existing = code
    catalog.workspace.registry.created_by_others = {NAME}
    registry.ensure_model(catalog.platform, NAME)
    assert catalog.workspace.registry.models[NAME].user_id == "another"


def test_a_user_who_may_not_create_models_can_use_an_existing_model(catalog: Catalog) -> None:
    registry.ensure_model(catalog.platform, NAME)
    catalog.workspace.denied = {"registered-models/create"}
    registry.ensure_model(catalog.platform, NAME)
    with pytest.raises(UserError, match="PERMISSION_DENIED"):
        registry.ensure_model(catalog.platform, f"{SCHEMA}.other")


REFUSED: dict[str, Callable[[Catalog, registry.ModelVersion], object]] = {
    "registered-models/get": lambda catalog, _: registry.resolve(catalog.platform, NAME, "latest"),
    "registered-models/set-tag": lambda catalog, version: aliases.promote(catalog.platform, version),
    "registered-models/alias": lambda catalog, version: aliases.promote(catalog.platform, version),
    "model-versions/search": lambda catalog, _: registry.resolve(catalog.platform, NAME, "latest"),
    "model-versions/set-tag": lambda catalog, version: registry.tag(catalog.platform, version, {"gate": "passed"}),
}


@pytest.mark.parametrize("call", REFUSED)
def test_a_request_that_unity_catalog_refuses_is_reported_with_the_reason(catalog: Catalog, call: str) -> None:
    (version,) = catalog.add_versions(1)
    catalog.workspace.denied = {call}
    with pytest.raises(LakesightError, match="PERMISSION_DENIED"):
        REFUSED[call](catalog, version)


def test_a_missing_schema_is_named(catalog: Catalog) -> None:
    del catalog.workspace.schemas[SCHEMA]
    with pytest.raises(UserError, match=f"Schema '{SCHEMA}' does not exist"):
        registry.ensure_model(catalog.platform, NAME)


def test_the_error_about_a_missing_model_names_only_models_of_the_own_schema(catalog: Catalog) -> None:
    catalog.workspace.schemas["main.other"] = {}
    for name in ("main.other.secret", NAME):
        registry.ensure_model(catalog.platform, name)
    with pytest.raises(UserError, match=NAME) as refused:
        registry.resolve(catalog.platform, f"{SCHEMA}.absent", "latest")
    assert "secret" not in str(refused.value)


@pytest.mark.matrix
def test_a_version_whose_upload_was_killed_is_registered_again(catalog: Catalog) -> None:
    catalog.workspace.denied = {"model-versions/finalize"}
    with pytest.raises(LakesightError, match="PERMISSION_DENIED"):
        catalog.register()
    with pytest.raises(UserError, match="versions: none"):
        registry.resolve(catalog.platform, NAME, "latest")
    catalog.workspace.denied = set()
    version = catalog.register()
    assert version.version == "2"
    assert catalog.workspace.registry.versions[NAME, "2"].status == READY
    assert registry.resolve(catalog.platform, NAME, "latest") == catalog.register() == version


@pytest.mark.matrix
def test_a_version_that_was_created_twice_because_an_answer_was_lost_is_found_once(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    registry.ensure_model(catalog.platform, NAME)
    catalog.workspace.registry.lost = {"create"}
    version = catalog.register()
    assert [each.status for each in catalog.workspace.registry.versions.values()] == [PENDING, READY]
    assert (version.version, catalog.register()) == ("2", version)

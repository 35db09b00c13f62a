"""A downloaded model version is found without MLflow if, and only if, MLflow would find the same files."""

from __future__ import annotations

import dataclasses
import shutil
import sqlite3
from pathlib import Path

import pytest
from local_platforms import open_local
from model_server import register_random
from tiny_runs import tiny_run

from pipelines.errors import UserError
from pipelines.platform import Platform, sqlite_uri
from pipelines.tracking import aliases, registry
from pipelines.tracking.download import download
from pipelines.tracking.home_store.copied_version import CopiedVersion, find_copied_version
from pipelines.tracking.server import connect

NAME = "tiny"


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Platform:
    """A home folder with three versions of a model. The third version was not downloaded."""
    with pytest.MonkeyPatch.context() as patch:
        platform = open_local(patch, tmp_path_factory.mktemp("home"), database=empty_database)
    run = tiny_run().model_copy(update={"name": NAME})
    versions = [register_random(platform, tmp_path_factory.mktemp("run"), run) for _ in range(3)]
    aliases.promote(platform, versions[0])
    aliases.promote(platform, versions[1])
    for version in versions[:2]:
        download(platform, version)
    return platform


@pytest.fixture
def platform(registered: Platform, tmp_path: Path) -> Platform:
    """A copy of the home folder, which the test may change."""
    root = shutil.copytree(registered.root, tmp_path / "home")
    uri = sqlite_uri(root / "mlflow.db")
    return dataclasses.replace(registered, root=root, tracking_uri=uri, registry_uri=uri)


def by_mlflow(platform: Platform, which: str) -> CopiedVersion:
    version = registry.resolve(platform, NAME, which)
    folder, digest = download(platform, version)
    return CopiedVersion(version.version, version.run_id, folder, digest)


def number(platform: Platform, which: str) -> str | None:
    found = find_copied_version(platform, NAME, which)
    return found and found.number


@pytest.mark.parametrize(("which", "expected"), [("champion", "2"), ("previous", "1"), ("1", "1"), ("2", "2")])
def test_a_downloaded_version_is_found_by_number_and_alias_as_mlflow_finds_it(
    platform: Platform, which: str, expected: str
) -> None:
    found = find_copied_version(platform, NAME, which)
    assert found == by_mlflow(platform, which)
    assert found.number == expected


def test_mlflow_looks_up_a_version_that_does_not_exist_or_was_not_downloaded(platform: Platform) -> None:
    for which in ("9", "01", "challenger", "3", "latest"):
        assert number(platform, which) is None, which
    assert find_copied_version(platform, "other", "1") is None
    with pytest.raises(UserError, match="no version or alias '01'"):
        registry.resolve(platform, NAME, "01")
    assert by_mlflow(platform, "latest").number == "3"
    assert number(platform, "latest") == "3", "the version is found after its download"


def test_a_deleted_version_and_an_alias_of_digits_mean_the_same_version_as_for_mlflow(platform: Platform) -> None:
    client = connect(platform)
    client.set_registered_model_alias(NAME, "2", "1")
    assert number(platform, "2") == by_mlflow(platform, "2").number == "2"
    client.delete_model_version(NAME, "3")
    assert number(platform, "latest") == by_mlflow(platform, "latest").number == "2"
    client.delete_model_version(NAME, "2")
    assert (number(platform, "2"), number(platform, "champion")) == (None, None)


@pytest.mark.parametrize("change", ["weights", "digest"])
def test_mlflow_looks_up_a_version_whose_files_or_registered_digest_were_changed(
    platform: Platform, change: str
) -> None:
    found = find_copied_version(platform, NAME, "2")
    assert found
    if change == "weights":
        weights = found.folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    else:
        connect(platform).set_model_version_tag(NAME, "2", "lakesight_digest", "other")
    assert number(platform, "2") is None
    assert number(platform, "1") == "1"


def test_a_registry_outside_the_home_folder_is_only_read_by_mlflow(platform: Platform) -> None:
    address = "http://127.0.0.1:9"
    assert find_copied_version(dataclasses.replace(platform, tracking_uri=address), NAME, "2") is None
    assert find_copied_version(dataclasses.replace(platform, registry_uri=address), NAME, "2") is None


def test_mlflow_looks_up_a_version_if_the_store_is_damaged_or_has_models_of_the_same_name_in_two_workspaces(
    platform: Platform,
) -> None:
    file = platform.root / "mlflow.db"
    with sqlite3.connect(file) as store:
        store.execute("INSERT INTO registered_models (workspace, name) VALUES ('other', ?)", (NAME,))
        store.execute(
            "INSERT INTO model_versions (workspace, name, version, run_id, creation_time) "
            "SELECT 'other', name, version, run_id, creation_time FROM model_versions WHERE name = ? AND version = 2",
            (NAME,),
        )
    assert number(platform, "2") is None
    file.write_bytes(b"no database")
    assert number(platform, "1") is None
    file.unlink()
    assert number(platform, "1") is None

"""Tests that models, runs and artifacts are found after a home folder was moved, copied or renamed to any name."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from processes import TEST_PATH
from tiny_runs import tiny_run

from pipelines.config import LocalPlatformConfig
from pipelines.errors import UserError
from pipelines.formats.run_folder import RunFolder, write_json
from pipelines.platform import Platform, local
from pipelines.tracking import registry, runs
from pipelines.tracking.download import download
from pipelines.tracking.home_store.moved_home import LOCATIONS
from pipelines.tracking.server import connect

ODD = "h\u00f6me %41 #1 [2] &?y=1 %"
CONFIG = tiny_run()
REGISTER = """
from model_server import register_random
from tiny_runs import tiny_run
from pipelines.config import LocalPlatformConfig
from pipelines.platform import local
platform = local(LocalPlatformConfig())
register_random(platform, platform.root, tiny_run())
"""


def open_home(path: Path | str) -> Platform:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAKESIGHT_HOME", str(path))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("MLFLOW_REGISTRY_URI", raising=False)
        return local(LocalPlatformConfig())


def locations(home: Path) -> list[str]:
    """Return all locations of artifacts in the home's store, without the location of MLflow's default experiment."""
    store = sqlite3.connect(home / "mlflow.db")
    columns = [(table, column) for table, names in LOCATIONS.items() for column in names]
    found = [row[0] for table, column in columns for row in store.execute(f"SELECT {column} FROM {table}")]
    store.close()
    return [location for location in found if "mlruns/0" not in location and not location.startswith("models:")]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    """A home folder whose name must be escaped in URLs, and in which a model was registered."""
    home = tmp_path_factory.mktemp("first") / ODD
    home.mkdir()
    shutil.copy(empty_database, home / "mlflow.db")
    # The command runs in another process, because MLflow caches the location of a run's artifacts in each process.
    environment = os.environ | {"LAKESIGHT_HOME": str(home), "PYTHONPATH": TEST_PATH}
    subprocess.run([sys.executable, "-c", REGISTER], env=environment, check=True)
    shards = (home / "shards").rename(home / "moving")
    (home / "shards").mkdir()
    shards = shards.rename(home / "shards" / "tiny-train-0123")
    [folder] = (home / "runs").iterdir()
    run = RunFolder(folder)
    paths = {
        "train_shards": str(shards),
        "validate_shards": str(shards),
    }  # Lakesight 0.1.0 wrote absolute paths
    write_json(run.run_file, run.read_run().model_copy(update=paths))
    return home


def test_all_files_are_written_inside_the_home_folder_even_if_its_name_must_be_escaped_in_urls(original: Path) -> None:
    assert [path.name for path in original.parent.iterdir()] == [ODD]
    assert {"mlflow.db", "mlartifacts", "runs", "shards"} <= {path.name for path in original.iterdir()}


@pytest.mark.parametrize("name", ["moved home", ODD + " again", pytest.param("plain", marks=pytest.mark.matrix)])
def test_a_model_in_a_moved_home_folder_is_found_and_its_training_run_is_continued(
    original: Path, tmp_path: Path, name: str
) -> None:
    moved = tmp_path / name
    shutil.copytree(original, moved)
    away = original.with_name("away")
    original.rename(away)
    try:
        platform = open_home(moved)
        version = registry.resolve(platform, "tiny", "latest")
        assert (download(platform, version).folder / "model.safetensors").is_file()
        [folder] = (moved / "runs").iterdir()
        with runs.follow(RunFolder(folder), CONFIG, platform) as follower:
            pass
        assert follower.run_id == version.run_id
        assert registry.register(RunFolder(folder), follower.run_id, platform) == version
        assert not original.exists(), "something was written at the earlier path"
    finally:
        away.rename(original)
    assert {location.partition("/mlartifacts")[0] for location in locations(moved)} == {moved.as_uri()}
    if "%" not in name:  # MLflow takes a path with `%`, `#` or `?` for a URI, and cannot load a model from there
        assert mlflow.pyfunc.load_model("models:/tiny/1").metadata


def test_a_copied_home_folder_uses_its_own_artifacts_while_the_original_still_exists(
    original: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(original, copy)
    connect(open_home(copy))
    assert {location.partition("/mlartifacts")[0] for location in locations(copy)} == {copy.as_uri()}
    connect(open_home(original))
    assert {location.partition("/mlartifacts")[0] for location in locations(original)} == {original.as_uri()}


@pytest.mark.parametrize("as_uri", [False, True])
def test_a_version_that_a_user_registered_from_a_folder_of_the_home_follows_the_home(
    original: Path, tmp_path: Path, as_uri: bool
) -> None:
    home, copy = tmp_path / "h\u00f6me %41", tmp_path / "copy"
    shutil.copytree(original, home)
    folder = next((home / "mlartifacts").rglob("artifacts"))
    client = connect(open_home(home))
    client.create_model_version("tiny", folder.as_uri() if as_uri else str(folder))
    shutil.copytree(home, copy)
    client = connect(open_home(copy))
    own = copy / folder.relative_to(home)
    version = client.get_model_version("tiny", "2")
    assert version.source == (own.as_uri() if as_uri else str(own))
    assert not [location for location in locations(copy) if not location.startswith((copy.as_uri(), f"{copy}/"))]


def test_opening_a_home_folder_by_a_symbolic_link_or_without_its_artifacts_keeps_the_stored_locations(
    original: Path, tmp_path: Path
) -> None:
    before = locations(original)
    (tmp_path / "link").symlink_to(original)
    connect(open_home(tmp_path / "link"))
    assert locations(original) == before
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(original / "mlflow.db", other / "mlflow.db")  # copy no artifacts
    connect(open_home(other))
    assert locations(other) == before


@pytest.mark.parametrize("url", ["s3a://bucket/home", "gs://bucket", "dbfs:/home", "file:///home"])
def test_a_url_as_home_folder_is_refused_with_an_error_of_one_paragraph(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"must be a folder, not a URL") as refused:
        open_home(url)
    assert list(tmp_path.iterdir()) == []
    assert "\n" not in str(refused.value)

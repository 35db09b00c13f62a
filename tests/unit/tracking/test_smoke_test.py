"""Tests of the smoke test of a model version: only registered code is executed, in a process without credentials."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from local_platforms import open_local
from model_server import register_random
from tiny_runs import tiny_run

from pipelines.errors import StageFailed
from pipelines.platform import Platform
from pipelines.tracking import registry, smoke_test
from pipelines.tracking.version_files import check_all_files

PRINT_NAMES = 'import json, os\nprint(json.dumps({"errors": sorted(os.environ)}))\n'


def test_the_process_that_executes_the_code_of_a_version_receives_no_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_TOKEN", "DATABRICKS_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "c4nary")
    (tmp_path / "child.py").write_text(PRINT_NAMES)
    monkeypatch.setattr(smoke_test, "CHILD_SCRIPT", tmp_path / "child.py")
    (tmp_path / "version").mkdir()
    names = smoke_test.smoke_test_folder(tmp_path / "version", []).errors
    assert "PATH" in names
    assert not [name for name in names if "TOKEN" in name or "SECRET" in name or name.startswith("MLFLOW")]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Platform:
    with pytest.MonkeyPatch.context() as patch:
        return open_local(patch, tmp_path_factory.mktemp("home"), database=empty_database)


@pytest.fixture(scope="module")
def registered(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> registry.ModelVersion:
    return register_random(platform, tmp_path_factory.mktemp("run"), tiny_run())


def append(name: str) -> Callable[[Path, str], None]:
    def plant(version: Path, code: str) -> None:
        file = version / name
        file.write_text(f"{file.read_text()}\n{code}" if file.exists() else code)

    return plant


def change_settings(before: str, after: str, file: str) -> Callable[[Path, str], None]:
    """Return a function that adds a file to a model version, and changes MLmodel so that MLflow would run the file."""

    def plant(version: Path, code: str) -> None:
        (version / file).parent.mkdir(exist_ok=True)
        (version / file).write_text(code)
        settings = version / "MLmodel"
        found = settings.read_text()
        assert before in found
        settings.write_text(found.replace(before, after))

    return plant


def replace_weights(version: Path, code: str) -> None:
    (version / "artifacts" / "model.safetensors").write_bytes(b"other weights")


PLANTS = {
    "code": append("code/vlm/__init__.py"),
    "module": append("code/sitecustomize.py"),
    "model.py": append("model.py"),
    "requirements": append("requirements.txt"),
    "artifact": append("artifacts/more.py"),
    "loader": change_settings("loader_module: mlflow.pyfunc.loaders.code_model", "loader_module: mine", "code/mine.py"),
    "python path": change_settings("    code: code", "    code: other", "other/vlm.py"),
    "weights": replace_weights,
}


def test_the_unchanged_files_of_a_model_version_pass_the_check_of_digests(
    platform: Platform, registered: registry.ModelVersion, tmp_path: Path
) -> None:
    folder = registry.download_files(platform, registered, tmp_path)
    check_all_files(folder, registered.tags, "here")
    for added in (folder, folder / "metadata"):  # MLflow adds these files to a download from a tracking server
        added.mkdir(exist_ok=True)
        (added / "registered_model_meta").write_text("model_name: tiny")
    check_all_files(folder, registered.tags, "here")


def test_a_model_version_without_digests_from_an_earlier_release_is_loaded_with_a_warning(
    platform: Platform, registered: registry.ModelVersion, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = registry.download_files(platform, registered, tmp_path)
    check_all_files(folder, {}, "here")
    assert any("here was registered by an earlier release without a digest" in message for message in caplog.messages)


@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS)
def test_no_code_of_a_model_version_is_executed_if_its_files_differ_from_the_registered_files(
    platform: Platform, registered: registry.ModelVersion, tmp_path: Path, plant: Callable[[Path, str], None]
) -> None:
    [settings] = (platform.root / "mlartifacts").rglob("MLmodel")
    version, executed = settings.parent, tmp_path / "executed"
    shutil.copytree(version, tmp_path / "intact")
    plant(version, f"open({str(executed)!r}, 'w')")
    try:
        with pytest.raises(StageFailed, match="differ from the files that were registered"):
            smoke_test.smoke_test_version(platform, registered, [])
    finally:
        shutil.rmtree(version)
        shutil.move(tmp_path / "intact", version)
    assert not executed.exists()

"""Tests of downloaded model versions: a copy is used only if it is intact and comes from the current model registry.
Table `decisions` names the champion of this registry.
"""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import time
from pathlib import Path

import pytest
from deltalake import DeltaTable
from model_server import register_random
from pyspark.sql import SparkSession
from tiny_runs import tiny_run

from jobs.common import Job
from jobs.output import CommandOutput
from jobs.promote import run_promote
from pipelines.config import LocalPlatformConfig
from pipelines.driver.evaluate.decisions import record_decision, recorded_champion
from pipelines.errors import StageFailed, UserError
from pipelines.formats.model_copy import RECORD
from pipelines.formats.run_folder import RunFolder
from pipelines.platform import Platform, local
from pipelines.tracking import aliases, registry, runs
from pipelines.tracking.download import download
from pipelines.tracking.logged_model import MODEL_FILES

SERVER = "http://127.0.0.1:9"  # no server answers at this address


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Platform:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAKESIGHT_HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("MLFLOW_REGISTRY_URI", raising=False)
        opened = local(LocalPlatformConfig())
    shutil.copy(empty_database, opened.root / "mlflow.db")
    return opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def registered(platform: Platform, folder: Path) -> registry.ModelVersion:
    return register_random(platform, folder, tiny_run())


def test_the_weights_of_a_model_version_are_downloaded_only_once(
    platform: Platform, registered: registry.ModelVersion
) -> None:
    folder, digest = download(platform, registered)
    assert sorted(path.name for path in folder.iterdir()) == sorted((*MODEL_FILES, RECORD))
    assert digest == registered.tags["digest"]
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    offline = dataclasses.replace(platform, tracking_uri="http://127.0.0.1:9", registry_uri="http://127.0.0.1:9")
    assert download(offline, registered) == (folder, digest)
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_model_version_of_another_registry_with_the_same_name_and_number_has_a_separate_copy(
    platform: Platform, registered: registry.ModelVersion
) -> None:
    folder = download(platform, registered).folder
    for other in ({"run_id": "another run"}, {"created_ms": registered.created_ms + 1}):
        assert download(platform, registered.model_copy(update=other)).folder != folder


def test_a_run_logged_to_two_servers_in_turn_has_one_mlflow_run_and_one_model_version_on_each_server(
    platform: Platform, folder: Path, registered: registry.ModelVersion, empty_database: Path, tmp_path: Path
) -> None:
    uri = f"sqlite:///{shutil.copy(empty_database, tmp_path / 'other.db')}"
    other = dataclasses.replace(platform, tracking_uri=uri, registry_uri=uri)
    [path] = (folder / "runs").iterdir()
    versions = []
    for opened in (other, platform, other, platform):
        with runs.follow(RunFolder(path), tiny_run(), opened) as follower:
            pass
        versions.append(registry.register(RunFolder(path), follower.run_id, opened))
    assert versions[1] == versions[3] == registered
    assert versions[0] == versions[2] != registered
    assert download(other, versions[0]).folder != download(platform, registered).folder


def test_a_model_version_whose_copy_was_damaged_or_replaced_is_downloaded_again(
    platform: Platform, registered: registry.ModelVersion
) -> None:
    folder, _ = download(platform, registered)
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    for damage in (good[:-1], good[:-1] + bytes([good[-1] ^ 1])):
        weights.write_bytes(damage)
        assert download(platform, registered).folder == folder
        assert weights.read_bytes() == good
    weights.unlink()
    download(platform, registered)
    assert weights.read_bytes() == good
    os.utime(weights, (1, 1))  # `cp -r` of the home folder changes the times too
    offline = dataclasses.replace(platform, tracking_uri="http://127.0.0.1:9", registry_uri="http://127.0.0.1:9")
    assert download(offline, registered).folder == folder


def test_a_downloaded_model_version_whose_files_differ_from_the_registered_files_is_refused(
    platform: Platform, registered: registry.ModelVersion
) -> None:
    configs = list((platform.root / "mlartifacts").rglob("artifacts/config.json"))
    assert configs
    without_copy = registered.model_copy(update={"created_ms": 0})
    good = {path: path.read_bytes() for path in configs}
    for path, content in good.items():
        path.write_bytes(content + b"\n")
    try:
        for _ in range(2):
            with pytest.raises(StageFailed, match="differ from the files that were registered"):
                download(platform, without_copy)
    finally:  # other tests of this file use the same version, in any order
        for path, content in good.items():
            path.write_bytes(content)


def test_a_decision_for_a_promotion_that_was_not_carried_out_is_corrected_in_the_decisions_table(
    platform: Platform, registered: registry.ModelVersion
) -> None:
    def no_spark() -> SparkSession:
        raise AssertionError("a JVM would start")

    opened = dataclasses.replace(platform, open_spark=no_spark)
    job = Job(tiny_run(), opened, (), CommandOutput(io.StringIO(), as_json=False))
    aliases.promote(platform, registered)
    record_decision(
        no_spark, opened, model=registered.name, version="9", digest="d", action="promote", champion=registered.version
    )
    for _ in range(2):
        assert run_promote(job, "champion").already
    digest = registered.tags["digest"]
    assert recorded_champion(no_spark, opened, registered.name) == (registered.version, digest)
    assert opened.tables
    assert DeltaTable(opened.tables / "decisions").to_pyarrow_table().num_rows == 2


def test_a_changed_generation_setting_is_refused_for_the_champion_too_because_the_gate_would_ignore_the_setting(
    platform: Platform, registered: registry.ModelVersion
) -> None:
    aliases.promote(platform, registered)
    own = tiny_run()
    model = own.model.model_copy(update={"generation": own.model.generation.changed({"max_new_tokens": 2})})
    changed = own.model_copy(update={"model": model})
    job = Job(changed, platform, ("model.generation.max_new_tokens=2",), CommandOutput(io.StringIO(), as_json=False))
    with pytest.raises(UserError, match="cannot change this setting") as refused:
        run_promote(job, "champion")
    assert "`caption`" in refused.value.fix
    given = (f"model.generation.seed={own.model.generation.seed}", *job.overrides)
    both = dataclasses.replace(job, overrides=(*given, "model.generation.max_new_tokens=3"))
    with pytest.raises(UserError, match="cannot change this setting") as refused:
        run_promote(both, "champion")
    assert refused.value.got == "--set model.generation.max_new_tokens=3", "the last override that changes a setting"


def test_a_version_without_the_files_of_a_lakesight_model_is_refused_and_the_error_names_the_files(
    platform: Platform, registered: registry.ModelVersion
) -> None:
    good = {path: path.read_bytes() for path in (platform.root / "mlartifacts").rglob(f"artifacts/{MODEL_FILES[0]}")}
    assert good
    for path in good:
        path.unlink()
    try:
        with pytest.raises(StageFailed, match=f"no artifacts/{MODEL_FILES[0]}"):
            download(platform, registered.model_copy(update={"created_ms": 0}))
    finally:
        for path, content in good.items():
            path.write_bytes(content)


def test_two_processes_that_end_the_same_download_at_the_same_moment_both_get_the_copy(
    platform: Platform, registered: registry.ModelVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, digest = download(platform, registered)
    shutil.rmtree(folder)
    others: list[Path] = []
    rename = Path.rename

    def rename_after_the_other_process(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp" and not others:
            others.append(shutil.copytree(path, target))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_after_the_other_process)
    assert download(platform, registered) == (folder, digest)
    assert others == [folder]
    assert not list(folder.parent.glob(".*")), "no incomplete or replaced copy is left"


def test_a_download_removes_the_remains_of_a_killed_download_but_not_of_a_running_one(
    platform: Platform, registered: registry.ModelVersion
) -> None:
    folder = download(platform, registered).folder
    killed, running = (folder.with_name(f".{name}.tmp") for name in ("killed", "running"))
    for partial in (killed, running):
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(b"the first bytes")
    two_days_ago = time.time() - 2 * 24 * 60 * 60
    os.utime(killed, (two_days_ago, two_days_ago))
    shutil.rmtree(folder)
    assert download(platform, registered).folder == folder
    assert not killed.exists()
    assert running.exists()
    shutil.rmtree(running)

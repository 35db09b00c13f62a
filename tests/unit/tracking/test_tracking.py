"""Tests of training runs and the model registry with MLflow on SQLite."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import re
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import create_autospec

import mlflow
import pandas as pd
import pytest
import torch
from local_platforms import open_local
from mlflow import MlflowClient
from mlflow.entities import Metric
from PIL import Image
from tiny_runs import finish_run, log_step, save_checkpoint, tiny_run, write_run, write_shards

from pipelines.config import LocalPlatformConfig, RunConfig
from pipelines.errors import TrainingFailed, UserError
from pipelines.formats.run_folder import (
    CaptionSample,
    CaptionSamples,
    Failure,
    Metrics,
    Result,
    RunFolder,
    read_json,
    write_json,
)
from pipelines.platform import Platform
from pipelines.tracking import registry, runs
from pipelines.tracking.describe.figures import EXPERT_LOAD, draw_expert_load
from pipelines.tracking.download import download
from pipelines.tracking.server import connect
from pipelines.tracking.smoke_test import find_pickles, smoke_test_folder
from vlm import text
from vlm.factory import build_model

CONFIG = tiny_run()


@pytest.fixture
def platform(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Platform:
    return open_local(monkeypatch, tmp_path / "home", database=empty_database)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    shards = write_shards(tmp_path / "shards", rows=6)
    return write_run(tmp_path / "runs" / "tiny-0123", CONFIG, shards, shards)


@contextmanager
def followed(run: RunFolder, platform: Platform, config: RunConfig = CONFIG) -> Iterator[str]:
    """Follow a run on a tracking server that answers, and yield the id of the MLflow run."""
    with runs.follow(run, config, platform) as follower:
        assert follower.run_id
        yield follower.run_id


def log_samples(run: RunFolder, step: int) -> None:
    samples = tuple(CaptionSample(row=r, image_id=f"tiny/{r}", text="red", caption=f"at {step}") for r in range(2))
    write_json(run.samples(step), CaptionSamples(step=step, samples=samples))


def steps(client: MlflowClient, run_id: str, key: str = "loss") -> list[int]:
    return [point.step for point in client.get_metric_history(run_id, key)]


def picture(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------ runs


def test_the_mlflow_run_logs_each_step_once_and_has_parameters_tags_and_config(
    platform: Platform, run: RunFolder
) -> None:
    with followed(run, platform) as run_id:
        for step in range(0, 30, 2):
            log_step(run, step)
        run.profile.parent.mkdir()
        run.profile.write_bytes(b"a trace")
        run.hosts.write_bytes(b"two hosts")
        client = connect(platform)
        deadline = time.monotonic() + 30
        while not steps(client, run_id) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert steps(client, run_id), "no metric was logged during training"
    logged = client.get_run(run_id)
    assert steps(client, run_id) == list(range(0, 30, 2))
    assert logged.info.status == "FINISHED"
    assert logged.data.params["train.optimizer.lr"] == str(CONFIG.train.optimizer.lr)
    assert logged.data.tags["lakesight.content_hash"] == run.read_run().content_hash
    assert logged.data.tags["lakesight.code_version"] == "test"
    assert logged.inputs is not None
    assert logged.inputs.dataset_inputs[0].dataset.digest == run.read_run().content_hash
    assert "run.json" in {artifact.path for artifact in client.list_artifacts(run_id)}
    assert Path(client.download_artifacts(run_id, "profile/rank-0.json.gz")).read_bytes() == b"a trace"
    assert Path(client.download_artifacts(run_id, "hosts.json")).read_bytes() == b"two hosts"


def test_the_expert_load_becomes_metrics_and_a_plot_of_the_last_step(platform: Platform, run: RunFolder) -> None:
    for step, load in {2: (0.5, 0.25, 0.25, 0.0), 4: (0.25, 0.25, 0.25, 0.25)}.items():
        with followed(run, platform) as run_id:  # the second pass resumes the run
            metrics = Metrics(step=step, time=1_700_000_000, values={}, expert_load={"decoder.blocks.0": load})
            write_json(run.metrics(step), metrics)
    history = connect(platform).get_metric_history(run_id, "expert_load/decoder.blocks.0.expert_0")
    assert [(point.step, point.value) for point in history] == [(2, 0.5), (4, 0.25)]
    draw_expert_load(metrics).savefig(expected := io.BytesIO())
    found = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=EXPERT_LOAD)
    with Image.open(found) as picture, Image.open(expected) as last:
        assert picture.tobytes() == last.tobytes()


def test_sample_captions_are_logged_as_an_mlflow_table_with_pictures(platform: Platform, run: RunFolder) -> None:
    with followed(run, platform) as run_id:
        log_samples(run, 6)
    with runs.follow(run, CONFIG, platform):
        log_samples(run, 12)
    table = mlflow.artifacts.load_dict(f"runs:/{run_id}/samples.json")
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [(row["step"], row["caption"]) for row in rows] == [(6, "at 6")] * 2 + [(12, "at 12")] * 2
    path = mlflow.artifacts.download_artifacts(f"runs:/{run_id}/{rows[0]['picture']['filepath']}")
    assert Image.open(path).size == (16, 16)


def test_a_resumed_run_continues_its_mlflow_run_and_repeats_no_step(platform: Platform, run: RunFolder) -> None:
    log_step(run, 0)
    log_step(run, 2)
    with pytest.raises(KeyboardInterrupt), followed(run, platform) as first:
        raise KeyboardInterrupt
    client = connect(platform)
    assert client.get_run(first).info.status == "KILLED"
    other_ranks = CONFIG.model_copy(update={"platform": LocalPlatformConfig(ranks=1)})
    with followed(run, platform, other_ranks) as second:
        assert client.get_run(second).info.status == "RUNNING"
        log_step(run, 4)
    assert second == first
    assert steps(client, first) == [0, 2, 4]
    assert runs.CAUSE_TAG not in client.get_run(first).data.tags


def test_the_mlflow_run_of_a_failed_training_has_the_cause_and_the_failure_records(
    platform: Platform, run: RunFolder
) -> None:
    record = {"rank": 1, "host": "h", "pid": 1, "exception": "ValueError", "message": "m", "traceback": "t", "step": 3}
    write_json(run.failure(1), Failure.model_validate(record | {"failed_at": 1.0, "consequence": False}))
    with pytest.raises(TrainingFailed), followed(run, platform) as run_id:
        raise TrainingFailed("rank 1 raised ValueError", where="host h")
    logged = connect(platform).get_run(run_id)
    assert logged.info.status == "FAILED"
    assert "rank 1 raised ValueError" in logged.data.tags[runs.CAUSE_TAG]
    assert [a.path for a in connect(platform).list_artifacts(run_id, "failures")] == ["failures/rank-1.json"]


def test_an_outage_during_training_loses_no_metric(platform: Platform, run: RunFolder) -> None:
    database = Path(platform.tracking_uri.removeprefix("sqlite:///"))
    with followed(run, platform) as run_id:
        log_step(run, 0)
        with sqlite3.connect(database) as connection:  # from now on, every request to log metrics fails
            connection.execute("ALTER TABLE metrics RENAME TO metrics_away")
        log_step(run, 2)
        client = connect(platform)
        follower = runs.Follower(run, CONFIG, platform)
        with pytest.raises(mlflow.MlflowException):
            follower.catch_up()
        with sqlite3.connect(database) as connection:
            connection.execute("ALTER TABLE metrics_away RENAME TO metrics")
        log_step(run, 4)
    assert steps(client, run_id) == [0, 2, 4]


def test_points_that_a_failed_request_stored_in_mlflow_are_not_logged_again(platform: Platform, run: RunFolder) -> None:
    """SQLite itself drops repeated points, so a mock client checks that no repeated point is sent."""
    client = create_autospec(MlflowClient, instance=True)
    client.get_run.return_value.data.metrics = {"loss": 0.5}
    client.get_metric_history.return_value = [Metric("loss", 1.0, 0, step) for step in (0, 2)]
    client.list_artifacts.return_value = []
    for step in (0, 2, 4):
        log_step(run, step)
    client.log_batch.side_effect = [mlflow.MlflowException("half of it"), None]
    follower = runs.Follower(run, CONFIG, platform)
    follower.client, follower.run_id = client, "r"
    with pytest.raises(mlflow.MlflowException):
        follower.catch_up()
    client.get_metric_history.return_value.append(Metric("loss", 1.0, 0, 4))
    log_step(run, 6)
    follower.catch_up()
    sent = [[point.step for point in call.kwargs["metrics"]] for call in client.log_batch.call_args_list]
    assert sent == [[4], [6]]


def test_a_new_mlflow_run_with_all_steps_replaces_a_deleted_mlflow_run(platform: Platform, run: RunFolder) -> None:
    with followed(run, platform) as first:
        log_step(run, 0)
    client = connect(platform)
    client.delete_run(first)
    with followed(run, platform) as second:
        log_step(run, 2)
    assert second != first
    assert steps(client, second) == [0, 2]


def test_mlflow_parameters_tags_and_artifacts_contain_no_token(
    platform: Platform, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken-value")
    monkeypatch.setenv("DATABRICKS_TOKEN", "t0ken-value")
    with followed(run, platform) as run_id:
        log_step(run, 0)
    logged = connect(platform).get_run(run_id)
    assert "t0ken-value" not in json.dumps(logged.to_dictionary())
    assert not [p for p in (platform.root / "mlartifacts").rglob("*") if p.is_file() and b"t0ken" in p.read_bytes()]


def test_logging_to_mlflow_prints_nothing(
    platform: Platform, run: RunFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    with followed(run, platform) as run_id:
        log_step(run, 0)
    finish_run(run)
    download(platform, registry.register(run, run_id, platform))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_tracking_leaves_environment_variables_unchanged(platform: Platform) -> None:
    connect(platform)
    assert not {"MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"} & set(os.environ)


def test_a_report_is_logged_to_mlflow_under_its_stage_name(platform: Platform, run: RunFolder, tmp_path: Path) -> None:
    page = tmp_path / "gallery.html"
    page.write_text("<p>", encoding="utf-8")
    with followed(run, platform) as run_id:
        pass
    for _ in range(2):  # the first call writes the table, and the second call adds no row
        tables: dict[str, dict[str, list[object]]] = {"rows.json": {"image_id": ["a", "b"], "loss": [0.5, 1.5]}}
        runs.log_report(platform, run_id, "evaluate", {"cider": 1.25}, [page], tables=tables)
    client = connect(platform)
    assert client.get_run(run_id).data.metrics["cider"] == 1.25
    assert [a.path for a in client.list_artifacts(run_id, "evaluate")] == [
        "evaluate/gallery.html",
        "evaluate/rows.json",
    ]
    table = mlflow.artifacts.load_dict(f"runs:/{run_id}/evaluate/rows.json")
    assert table["data"] == [["a", 0.5], ["b", 1.5]]


# ------------------------------------------------------------------------------------------------ registry


@pytest.fixture
def registered(platform: Platform, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> registry.ModelVersion:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)  # Python writes bytecode by default
    finish_run(run)
    with followed(run, platform) as run_id:
        pass
    return registry.register(run, run_id, platform)


def test_registering_a_run_twice_gives_one_version_with_its_lineage(
    platform: Platform, run: RunFolder, registered: registry.ModelVersion
) -> None:
    assert registry.register(run, registered.run_id, platform) == registered
    assert registered.version == "1"
    assert registered.tags["manifest_hash"] == run.read_run().content_hash
    assert registered.tags["table_version"] == "0"
    assert registered.tags["code_version"] == "test"
    assert registered.tags["training_val_blind_gap"] == "0.5"


def test_tags_of_a_version_are_valid_in_unity_catalog(platform: Platform, registered: registry.ModelVersion) -> None:
    registry.tag(platform, registered, {"val/blind-gap.x": "0.5", "gate_looks": "no " * 1000})
    tags = connect(platform).get_model_version(registered.name, registered.version).tags
    assert tags["lakesight_val_blind_gap_x"] == "0.5"
    assert all(re.fullmatch(r"\w{1,255}", key) and len(value) <= 1000 for key, value in tags.items())
    assert len(tags) <= 50


def test_a_registered_version_is_self_contained_and_contains_no_pickle(
    platform: Platform, registered: registry.ModelVersion, tmp_path: Path
) -> None:
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{registered.name}/1", dst_path=str(tmp_path / "got")))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"model.safetensors", "config.json", "tokenizer.json", "model.py", "generate.py"} <= {p.name for p in files}
    assert find_pickles(folder) == []
    assert not [path for path in files if path.suffix == ".pyc"]
    pinned = (folder / "requirements.txt").read_text(encoding="utf-8").split()
    assert f"torch=={torch.__version__.partition('+')[0]}" in pinned
    assert all("==" in line for line in pinned)


def test_the_model_loads_without_unpickling_and_captions_pictures_as_bytes_and_as_base64_alike(
    platform: Platform, registered: registry.ModelVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    connect(platform)
    model = mlflow.pyfunc.load_model(f"models:/{registered.name}/{registered.version}")
    encoded = base64.b64encode(picture()).decode()
    table = pd.DataFrame({"image": [picture(), encoded, f"data:image/png;base64,{encoded}"]})
    predictions = model.predict(table)
    assert predictions["error"].isna().all()
    assert predictions["caption"].nunique() == 1
    assert list(model.predict(table.assign(prompt="a"))["error"].isna()) == [True] * 3


def test_a_bad_picture_gives_an_error_in_its_own_row_only(
    platform: Platform, registered: registry.ModelVersion
) -> None:
    connect(platform)
    model = mlflow.pyfunc.load_model(f"models:/{registered.name}/1")
    good = picture("blue")
    predictions = model.predict(pd.DataFrame({"image": [b"no picture", good, "%%%", None, good[:60]]}))
    reasons = [None if pd.isna(error) else str(error).partition(":")[0] for error in predictions["error"]]
    assert reasons == ["not_an_image", None, "bad_base64", "missing_field", "truncated_image"]
    assert predictions["caption"].isna().tolist() == [True, False, True, True, True]
    alone = model.predict(pd.DataFrame({"image": [good]}))
    assert alone["caption"][0] == predictions["caption"][1]


def test_the_error_for_an_unknown_model_version_or_alias_lists_the_existing_versions_and_aliases(
    platform: Platform, registered: registry.ModelVersion
) -> None:
    registry.set_alias(platform, registered, "champion")
    assert registry.resolve(platform, "tiny", "champion").version == "1"
    assert registry.resolve(platform, "tiny", "latest").version == "1"
    with pytest.raises(UserError, match="the run of a registered model: tiny"):
        registry.resolve(platform, "tyni", "1")
    for which in ("7", "challenger"):
        with pytest.raises(UserError, match=r"versions: 1; aliases: champion \(= 1\)"):
            registry.resolve(platform, "tiny", which)


def test_the_smoke_test_loads_the_model_in_a_new_process_and_refuses_pickles(
    platform: Platform, registered: registry.ModelVersion, tmp_path: Path
) -> None:
    folder = registry.download_files(platform, registered, tmp_path)
    trial = smoke_test_folder(folder, [(picture(), ""), (b"no picture", "a")])
    assert (trial.failure, trial.pictures) == ("", 2)
    assert [error.partition(":")[0] for error in trial.errors] == ["not_an_image"]
    (folder / "artifacts" / "weights.pt").write_bytes(pickle.dumps(["anything"]))
    assert smoke_test_folder(folder, []).failure == "the version contains pickles: artifacts/weights.pt"
    (folder / "artifacts" / "weights.pt").rename(folder / "artifacts" / "weights.dat")
    assert smoke_test_folder(folder, []).failure == "the version contains pickles: artifacts/weights.dat"


def test_the_best_checkpoint_and_any_kept_checkpoint_can_be_registered_besides_the_last_checkpoint(
    platform: Platform, run: RunFolder, registered: registry.ModelVersion
) -> None:
    tokenizer = text.load(run.tokenizer)
    save_checkpoint(run.checkpoint(8), build_model(CONFIG.model, tokenizer.vocab_size), tokenizer)
    write_json(run.metrics(8), Metrics(step=8, time=0.0, values={"val/loss": 1.25}))
    result = read_json(run.result, Result).model_copy(update={"best_checkpoint": str(run.checkpoint(8))})
    write_json(run.result, result)
    best = registry.register(run, registered.run_id, platform, "best")
    assert (best.version, best.tags["checkpoint"], best.tags["training_val_loss"]) == ("2", "step_000008", "1.25")
    assert best.tags["digest"] != registered.tags["digest"]
    assert registry.register(run, registered.run_id, platform, "best") == best
    assert registry.register(run, registered.run_id, platform, 8) == best
    assert registry.register(run, registered.run_id, platform) == registered
    save_checkpoint(run.checkpoint(7), build_model(CONFIG.model, tokenizer.vocab_size), tokenizer)
    further = registry.register(run, registered.run_id, platform, 7)
    assert (further.version, further.tags.get("training_val_loss")) == ("3", None), "step 7 was not validated"
    with pytest.raises(
        UserError, match=r"no checkpoint of this step.*step 9; the run has checkpoints of the steps 7, 8, 12"
    ):
        registry.register(run, registered.run_id, platform, 9)


def test_a_run_that_is_not_finished_is_not_registered(platform: Platform, run: RunFolder) -> None:
    with followed(run, platform) as run_id:
        pass
    with pytest.raises(UserError, match=r"result\.json is missing"):
        registry.register(run, run_id, platform)

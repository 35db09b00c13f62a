"""Tests of the MLflow page of a captioning job: the page shows and names only what the job itself captioned."""

from __future__ import annotations

import io
import shlex
from datetime import UTC, datetime
from pathlib import Path

import mlflow
import pytest
import typer
from mlflow import MlflowClient
from mlflow.entities import Run
from pictures import png
from pyspark.sql import SparkSession
from tiny_runs import save_random_model, tiny_run

from jobs.cli import app
from jobs.common import Job
from jobs.log_captions import log_captions
from jobs.output import CommandOutput
from pipelines.driver.caption.run import CaptionRequest, caption
from pipelines.driver.model_files import ModelFiles
from pipelines.platform import Platform
from pipelines.tracking.describe.notes import NOTE


@pytest.mark.matrix
def test_a_captioning_job_logs_only_captions_of_its_own_column_and_all_options_of_its_command(
    spark: SparkSession, platform: Platform, tmp_path: Path
) -> None:
    """Two jobs caption two picture columns of one table at the same time."""
    save_random_model(tmp_path / "model")
    model = ModelFiles(folder=tmp_path / "model", name=f"m-{tmp_path.name}", version="1", run_id="r")
    table = f"delta.`{tmp_path}/my photos`"
    rows = [(number, png(number), png(number + 3), f"{number}.png") for number in range(3)]
    for number, picture, *_ in rows:
        (tmp_path / f"{number}.png").write_bytes(picture)
    source = spark.createDataFrame(rows, "id INT, front BINARY, back BINARY, file STRING")
    source.write.format("delta").save(f"{tmp_path}/my photos")
    job = Job(
        tiny_run(ranks=1), platform, ("model.generation.num_beams=2",), CommandOutput(io.StringIO(), as_json=False)
    )
    job.__dict__["spark"] = spark  # the job uses the Spark session of the tests
    common = {"source_table": table, "id_column": "id", "where": "id < 9 AND front IS NOT NULL"}
    requests = [
        CaptionRequest.model_validate(common | {"image_column": "front"}),
        CaptionRequest.model_validate(common | {"image_column": "back"}),
        CaptionRequest.model_validate(
            common
            | {"image_column": "file", "image_root": str(tmp_path), "prompt": "what's it?", "retry_errors": True}
            | {"remove_deleted": True, "max_error_share": 0.5, "precision": "bf16"}
        ),
    ]
    started = datetime.now(UTC)
    reports = [caption(spark, platform, model, request) for request in requests]
    for report, request in zip(reports, requests, strict=True):
        assert report.captioned == 3
        log_captions(job, report, request, started, good=True)

    client = MlflowClient(platform.tracking_uri)
    mlflow.set_tracking_uri(platform.tracking_uri)
    for request in requests:
        run = logged_run(table, request.image_column)
        [page] = [file.path for file in client.list_artifacts(run.info.run_id) if file.path.endswith(".html")]
        text = Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path=page)).read_text()
        assert text.count("<figure") == text.count("data:image/jpeg;base64,") == 3
        assert run.data.tags["lakesight.id_column"] == "id"
        assert options_of_command(run.data.tags[NOTE]) == {
            "overrides": ["model.generation.num_beams=2"],
            "run": "tiny",
            "table": f"{tmp_path}/my photos",
            "version": "1",
        } | {name: getattr(request, name) for name in OPTIONS}

    other = {"considered": 3, "already": 3, "captioned": 0, "source_version": 1, "drift_unchecked": "2 captions"}
    log_captions(job, reports[0].model_copy(update=other), requests[0], datetime.now(UTC), good=True)
    assert logged_run(table, "front").info.status == "FINISHED", "a job that has nothing to caption is not logged"
    log_captions(job, reports[1].model_copy(update=other | {"recovered": 2}), requests[1], datetime.now(UTC), good=True)
    found = mlflow.search_runs(experiment_names=["lakesight/caption"], output_format="list")
    [text] = [run.data.tags[NOTE] for run in found if "2 captions of an interrupted job" in run.data.tags.get(NOTE, "")]
    assert "were recovered. Drift was not checked: 2 captions." in text


OPTIONS = (
    *("id_column", "image_column", "image_root", "where", "prompt", "precision", "max_error_share"),
    *("retry_errors", "remove_deleted"),
)
"""Options that have the same names in the command and in the request."""


def logged_run(table: str, image_column: str) -> Run:
    """Find the MLflow run of a captioning job by the tags that contain the job's table and picture column."""
    tags = {"source_table": table, "image_column": image_column}
    condition = " AND ".join(f"tags.`lakesight.{name}` = '{value}'" for name, value in tags.items())
    [run] = mlflow.search_runs(experiment_names=["lakesight/caption"], filter_string=condition, output_format="list")
    return run


def options_of_command(note: str) -> dict[str, object]:
    """Parse the command line in a description as Lakesight does, and return the options that the test compares."""
    [line] = [line for line in note.splitlines() if line.startswith("lakesight caption ")]
    command = typer.main.get_command(app).commands["caption"]  # type: ignore[attr-defined]
    parsed = command.make_context("caption", shlex.split(line)[2:]).params
    return {name: parsed[name] for name in (*OPTIONS, "overrides", "run", "table", "version")}

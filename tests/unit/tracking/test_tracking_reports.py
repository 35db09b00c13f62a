"""Tests of stage reports in MLflow on SQLite, and of the warning when no server answers."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest

from jobs.common import Job
from jobs.ingest import log_to_mlflow
from jobs.output import CommandOutput
from pipelines.config import load_run
from pipelines.driver.ingest.near_duplicates import NearReport
from pipelines.driver.ingest.report import Figures, FullReport
from pipelines.platform import Platform, local
from pipelines.tracking.server import connect


@pytest.fixture
def job(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Return a job with its own home folder and without a Spark session."""
    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = load_run("demo")
    platform: Platform = local(config.platform)  # type: ignore[arg-type]
    shutil.copy(empty_database, platform.root / "mlflow.db")
    return Job(config, platform, (), CommandOutput(io.StringIO(), as_json=False))


def report(page: Path, *, rows_in: int = 9) -> FullReport:
    page.write_text("<p>pictures</p>", encoding="utf-8")
    return FullReport(
        source="birds",
        ingest_id="0123",
        items=1,
        unchanged=0,
        rows_in=rows_in,
        new=rows_in - 4,
        merged=0,
        duplicates=3,
        quarantined=1,
        refused=2,
        reasons={"too_small": 1},
        removed=0,
        replaced={},
        splits={"train": 5},
        equal_pictures_across_splits=0,
        near_duplicates=NearReport(pictures=2),
        dataset_version=7,
        seconds=1.5,
        figures=Figures(formats={"PNG": 5}, sides={"64-127": 5}, texts={"1": 5}, chars={"8-15": 5}),
        page=str(page),
    )


def test_a_stage_report_becomes_an_mlflow_run_with_metrics_tags_and_an_html_page(job: Job, tmp_path: Path) -> None:
    done = report(tmp_path / "ingest-birds.html")
    log_to_mlflow(job, done, good=True)
    log_to_mlflow(job, done, good=False)
    client = connect(job.platform)
    experiment = client.get_experiment_by_name("lakesight/ingest")
    assert experiment is not None
    bad, good = client.search_runs([experiment.experiment_id])
    assert (bad.info.status, good.info.status) == ("FAILED", "FINISHED")
    assert good.data.tags["lakesight.kind"] == "ingest"
    assert good.data.tags["lakesight.table_version"] == "7"
    expected = {"rows_in": 9, "reasons/too_small": 1, "near_duplicates/pictures": 2, "figures/sides/64-127": 5}
    assert expected.items() <= good.data.metrics.items()
    assert {file.path for file in client.list_artifacts(good.info.run_id)} == {"ingest.json", "ingest-birds.html"}
    document = mlflow.artifacts.load_dict(f"runs:/{good.info.run_id}/ingest.json")
    assert document == json.loads(done.model_dump_json())
    assert good.info.run_name == "birds: 5 new, 1 quarantined"
    assert "lakesight ingest --run demo" in good.data.tags["mlflow.note.content"]
    assert "table `samples` at version 7" in good.data.tags["mlflow.note.content"]
    log_to_mlflow(Job(load_run("makemore"), job.platform, (), job.output), done, good=True)
    newest, *_ = client.search_runs([experiment.experiment_id])
    assert "table `texts` at version 7" in newest.data.tags["mlflow.note.content"]


def test_an_unreachable_server_gives_one_warning_within_a_minute(
    job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job.platform = replace(job.platform, tracking_uri="http://user:secret@127.0.0.1:9")
    started, before = time.monotonic(), dict(os.environ)
    with caplog.at_level(logging.WARNING):
        log_to_mlflow(job, report(tmp_path / "page.html"), good=True)
    [warning] = [record.getMessage() for record in caplog.records]
    assert "the tables are written, but the report could not be logged to MLflow" in warning
    assert "secret" not in warning
    assert time.monotonic() - started < 60
    assert dict(os.environ) == before


def test_an_ingest_without_new_rows_creates_no_run(job: Job, tmp_path: Path) -> None:
    nothing = report(tmp_path / "page.html", rows_in=4).model_copy(update={"duplicates": 4})
    log_to_mlflow(job, nothing, good=True)
    assert connect(job.platform).get_experiment_by_name("lakesight/ingest") is None

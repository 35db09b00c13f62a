"""Tests that a failure after the last caption hides neither the report of the job nor the error of its rows."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from caption_requests import picture, write
from deltalake import DeltaTable
from model_server import register_random
from pyspark.sql import SparkSession
from tiny_runs import tiny_run

from jobs.caption import DriftNotCompared, run_caption
from jobs.common import Job
from jobs.decisions import record, run_decisions
from jobs.output import CommandOutput
from pipelines.config import DriftConfig
from pipelines.driver.caption.run import CaptionReport, TooManyErrors
from pipelines.errors import FailedWithReport
from pipelines.formats.tables import DECISIONS, EVALUATIONS
from pipelines.platform import Platform
from pipelines.tracking import aliases


@pytest.fixture
def job(spark: SparkSession, platform: Platform, tmp_path: Path) -> Job:
    """Return a job whose model has an evaluation, a champion, and an old decision for another version."""
    config = tiny_run(ranks=1).model_copy(update={"name": f"m-{tmp_path.name}", "drift": DriftConfig(min_rows=2)})
    job = Job(config, platform, (), CommandOutput(io.StringIO(), as_json=False))
    job.__dict__["spark"] = spark  # the job uses the Spark session of the tests
    version = register_random(platform, tmp_path, config)
    aliases.promote(platform, version)
    past = datetime.now(UTC) - timedelta(hours=2)
    record(job, version.version, "rollback", champion=None, seen_at=past)
    folder = table_folder(platform, DECISIONS.name)
    DeltaTable(folder).update({"model_version": "'7'"}, predicate=f"model_name = '{job.model_name}'")
    evaluation: dict[str, Any] = dict.fromkeys(EVALUATIONS.names) | {
        **{"model_name": job.model_name, "model_version": version.version, "model_digest": version.tags["digest"]},
        **{"source": job.source, "split": config.data.evaluate_on, "metric": "brightness", "value": 0.5, "n": 100},
        **{"low": 0.0, "high": 1.0, "dataset_version": 1, "evaluated_at": past, "run_id": version.run_id},
    }
    rows = spark.createDataFrame([tuple(evaluation[name] for name in EVALUATIONS.names)], EVALUATIONS.ddl())
    rows.writeTo(platform.table(EVALUATIONS.name)).append()
    return job


def table_folder(platform: Platform, name: str) -> Path:
    assert platform.tables
    return platform.tables / name


@contextmanager
def without_data_files(folder: Path) -> Iterator[None]:
    """Hide the data files of a table during the block, as if the storage had lost them."""
    files = [file for file in folder.rglob("*.parquet") if "_delta_log" not in file.parts]
    assert files
    for file in files:
        file.rename(file.with_suffix(".hidden"))
    try:
        yield
    finally:
        for file in files:
            file.with_suffix(".hidden").rename(file)


@contextmanager
def without_reports(platform: Platform) -> Iterator[None]:
    """Replace the folder of the HTML pages by a file during the block, so that no page can be written."""
    folder = platform.folder("reports")
    folder.mkdir(exist_ok=True)
    folder.rename(folder.with_name("kept"))
    folder.touch()
    try:
        yield
    finally:
        folder.unlink()
        folder.with_name("kept").rename(folder)


def caption_photos(job: Job, table: str, **more: object) -> CaptionReport:
    return run_caption(job, "champion", source_table=table, id_column="id", image_column="photo", **more)


def report_of(failed: pytest.ExceptionInfo[FailedWithReport]) -> CaptionReport:
    assert isinstance(failed.value.report, CaptionReport)
    return failed.value.report


def test_too_many_errors_and_the_report_are_not_hidden_by_failures_after_the_last_caption(
    job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = write(job.spark, tmp_path / "photos", [(0, picture(0)), (1, picture(1)), (2, b"no picture")])
    evaluations, decisions = (table_folder(job.platform, each.name) for each in (EVALUATIONS, DECISIONS))
    with without_data_files(evaluations), without_data_files(decisions), without_reports(job.platform):
        with caplog.at_level(logging.WARNING), pytest.raises(TooManyErrors) as failed:
            caption_photos(job, table, max_error_share=0.0)
    report = report_of(failed)
    assert (report.captioned, report.errors) == (2, 1)
    assert report.drift_unchecked.startswith("the comparison failed: ")
    for said in ("the report could not be logged to MLflow", "the champion could not be compared with table decisions"):
        assert f"the captions are written, but {said}: " in caplog.text

    repeated = caption_photos(job, table)
    assert (repeated.captioned, repeated.drift_of_failed, set(repeated.drift)) == (0, True, {"brightness"})
    assert [(row["action"], row["model_version"]) for row in run_decisions(job)] == [
        ("rollback", "7"),
        ("promote", "1"),
    ]


def test_a_job_whose_drift_could_not_be_computed_fails_with_its_report(job: Job, tmp_path: Path) -> None:
    table = write(job.spark, tmp_path / "photos", [(0, picture(0)), (1, picture(1))])
    with without_data_files(table_folder(job.platform, EVALUATIONS.name)), pytest.raises(DriftNotCompared) as failed:
        caption_photos(job, table)
    assert (report_of(failed).captioned, report_of(failed).drift) == (2, {})

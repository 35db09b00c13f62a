"""Tests of the reason for which captions are not compared with the evaluation of their model version."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from local_platforms import open_local
from tiny_runs import save_random_model, tiny_run

from jobs.caption import check_drift
from jobs.common import Job
from jobs.output import CommandOutput
from pipelines.driver.caption.run import CaptionReport, CaptionRequest
from pipelines.driver.model_files import ModelFiles
from pipelines.formats.caption_stats import CaptionStats


@pytest.mark.parametrize(
    ("captioned", "recovered", "reason"),
    [
        (0, 9990, "9,990 captions of an interrupted job were not compared"),
        (10, 9990, "10 rows, and drift.min_rows is 100; 9,990 captions of an interrupted job were not compared"),
        (10, 0, "10 rows, and drift.min_rows is 100"),
        (0, 0, ""),
    ],
)
def test_a_job_says_that_it_has_not_compared_the_captions_of_an_interrupted_job(
    captioned: int, recovered: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = open_local(monkeypatch, tmp_path)
    save_random_model(tmp_path / "model")
    model = ModelFiles(folder=tmp_path / "model", name="m", version="1", run_id="r")
    counts = {"considered": 10_000, "already": 10_000 - captioned, "captioned": captioned, "errors": 0, "changed": 0}
    key = {"source_table": "samples", "model_name": "m", "model_version": "1", "settings_hash": "h"}
    report = CaptionReport.model_validate(
        counts
        | key
        | {"recovered": recovered, "source_version": 0, "model_digest": "", "run_id": "r", "removed": 0}
        | {"figures": CaptionStats().figures(), "seconds": 1.0}
    )
    job = Job(tiny_run(), platform, (), CommandOutput(io.StringIO(), as_json=False))
    assert check_drift(job, report, model, CaptionRequest()).drift_unchecked == reason

"""Tests of `lakesight lineage` with a registry that does not have the model versions or cannot be read."""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from local_platforms import open_local
from written_rows import write_rows

from jobs.common import Job
from jobs.lineage import ABSENT, UNREAD, run_lineage
from jobs.output import CommandOutput
from pipelines.config import load_run
from pipelines.formats.tables import GENERATED_CAPTIONS


@pytest.mark.parametrize(("tracking", "registry"), [(True, True), (True, False), (False, False)])
def test_lineage_never_says_that_a_version_is_missing_from_a_registry_that_does_not_answer(
    tracking: bool,
    registry: bool,
    tmp_path: Path,
    empty_database: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    platform = open_local(monkeypatch, tmp_path / "home", database=empty_database)
    assert platform.tables
    rows = [{"image_id": "a", "model_version": number, "run_id": f"r{number}"} for number in ("1", "2")]
    write_rows(platform.tables, GENERATED_CAPTIONS, *rows)
    platform = replace(
        platform,
        tracking_uri=platform.tracking_uri if tracking else "http://127.0.0.1:9",
        registry_uri=platform.registry_uri if registry else "http://127.0.0.1:9",
    )
    job = Job(load_run("demo"), platform, (), CommandOutput(io.StringIO(), as_json=False))
    with caplog.at_level(logging.WARNING):
        found = run_lineage(job, "a")
    assert {text for item in found for text in (item.trained_on, item.manifest_hash, item.code_version)} == {
        ABSENT if registry else UNREAD
    }
    assert [item.model_version for item in found] == ["1", "2"]
    warnings = [record for record in caplog.records if "cannot be read from the registry" in record.message]
    assert len(warnings) == (0 if registry else 1)

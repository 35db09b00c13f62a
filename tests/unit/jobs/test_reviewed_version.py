"""Tests of the version whose captions `lakesight review` shows in a home folder."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from local_platforms import open_local
from typer.testing import CliRunner
from written_rows import write_rows

from jobs.cli import app
from pipelines.errors import UserError
from pipelines.formats.tables import DECISIONS, GENERATED_CAPTIONS, SAMPLES
from pipelines.platform import Platform
from pipelines.tracking.server import connect

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def home(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Platform:
    """A home folder with a caption by version 2, which table `decisions` names as the champion."""
    platform = open_local(monkeypatch, tmp_path / "home", database=empty_database)
    client = connect(platform)
    client.create_registered_model("demo")
    for number in (1, 2):
        client.create_model_version("demo", f"file:///{number}")
    caption: dict[str, object] = {
        "image_id": "a/0",
        "model_name": "demo",
        "model_version": "2",
        "settings_hash": "h",
        "caption": "red",
    }
    caption |= {"source_table": "lakesight.samples", "sha256": "0", "prompt": "", "captioned_at": NOW}
    decision = {"model_name": "demo", "model_version": "2", "action": "promote", "decided_at": NOW}
    assert platform.tables
    write_rows(platform.tables, GENERATED_CAPTIONS, caption)
    write_rows(platform.tables, DECISIONS, decision)
    write_rows(platform.tables, SAMPLES, {"image_id": "a/0"})
    return platform


def test_the_review_page_follows_the_champion_of_the_registry_and_names_the_versions_that_have_captions(
    home: Platform,
) -> None:
    connect(home).set_registered_model_alias("demo", "champion", "1")
    done = CliRunner().invoke(app, ["review"])
    assert isinstance(done.exception, UserError)
    said = str(done.exception)
    assert "there are no captions to judge" in said
    assert "captions of version 2" in said
    assert "add --version 2 or --version all" in said

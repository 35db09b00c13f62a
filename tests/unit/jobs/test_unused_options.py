"""Tests that commands refuse options that they would ignore."""

from __future__ import annotations

from pathlib import Path

import pytest
from local_platforms import open_local
from typer.testing import CliRunner
from written_rows import write_rows

from jobs.cli import app
from pipelines.errors import UserError
from pipelines.formats.tables import GENERATED_CAPTIONS


@pytest.mark.parametrize(
    ("line", "unused"),
    [
        ("ask cat.png --checkpoint folder --version 3", "--version"),
        ("show samples --id-column sku", "--id-column"),
        ("show samples --image-column photo --image-root photos", "--image-column and --image-root"),
        ("show generated_captions --gallery --image-column photo", "--image-column"),
        ("quarantine replay --reason too_small --rows 9 --gallery", "--rows and --gallery"),
        ("maintain --keep 3 --retain-hours 720", "--retain-hours"),
        ("train --no-launch --replay-step 5", "--replay-step"),
        ("config models --run emoji --set model.text.kind=chars", "--run and --set"),
        ("config models --platform databricks", "--platform"),
    ],
)
def test_a_command_refuses_options_that_would_have_no_effect(
    line: str, unused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = open_local(monkeypatch, tmp_path / "home")
    assert platform.tables
    write_rows(platform.tables, GENERATED_CAPTIONS, {"image_id": "a", "image_column": "photo", "caption": "red"})
    error = CliRunner().invoke(app, line.split()).exception
    assert isinstance(error, UserError)
    assert error.what == f"{unused} would have no effect"
    assert error.fix == f"leave {unused} out"

"""Smoke test of a model version: the process that executes the code of a version receives no credentials."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.tracking import smoke_test

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

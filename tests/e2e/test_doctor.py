"""Test that `lakesight doctor` starts Spark and writes to a Delta table.

The command thus finds settings that break Delta.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from command_server import run_command

pytestmark = pytest.mark.matrix


def check_spark(home: Path, *overrides: str) -> dict[str, Any]:
    """Run `lakesight doctor` and return its check of Spark."""
    settings = [word for override in overrides for word in ("--set", override)]
    done = run_command("doctor", "--json", *settings, environment=os.environ | {"LAKESIGHT_HOME": str(home)})
    checks: dict[str, dict[str, Any]] = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    return checks["spark"]


def test_doctor_merges_a_row_into_a_delta_table_and_reports_settings_that_break_delta(tmp_path: Path) -> None:
    good = check_spark(tmp_path / "it's a `home`")
    assert (good["status"], good["fix"]) == ("ok", "")
    assert good["found"].endswith("a MERGE into a Delta table has worked")
    assert list((tmp_path / "it's a `home`" / "staged").iterdir()) == []
    broken = check_spark(tmp_path / "broken", "platform.spark.conf={spark.delta.logStore.class: none.Such}")
    assert (broken["status"], "none.Such" in broken["found"]) == ("fail", True)
    assert "platform.spark.conf" in broken["fix"]

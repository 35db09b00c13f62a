"""Families end to end by one command each: Spark, ranks, registry and captions, on generated scenes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("families")  # one process runs them: the fixture is the work

SCENES = 300
FAMILIES = ("seemoe", "vit_gpt2", "paligemma")

EACH = """
import sys
from jobs.cli import app
for run in sys.argv[1].split(","):
    app(["pipeline", "--run", run, "--json", *sys.argv[2:]], standalone_mode=False)
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What `lakesight pipeline --run FAMILY` reports. One process for all: its JVM is warm after the first."""
    home = tmp_path_factory.mktemp("families")
    environment = os.environ | {"LAKESIGHT_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    done = subprocess.run(
        [sys.executable, "-c", EACH, ",".join(FAMILIES), "--set", f"data.source.path=scenes:{SCENES}"],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(FAMILIES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_runs_from_pictures_to_captions(reports: dict[str, dict[str, object]], family: str) -> None:
    report = reports[family]
    assert report["trained"]
    assert report["model_name"] == family
    assert isinstance(report["blind_gap"], float)
    assert report["blind_gap"] > 0.2  # twice what promote asks for
    assert isinstance(report["captions"], int)
    assert report["captions"] > 0 == report["errors"]
    assert Path(str(report["gallery"])).is_file()

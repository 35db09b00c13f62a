"""Tests of commands on a full disk: the error is one paragraph, and the next command neither loses nor repeats work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from disk_faults import can_mount, run_on_small_disk
from processes import TEST_PATH

pytestmark = [
    pytest.mark.faults,
    pytest.mark.matrix,
    pytest.mark.timeout(1500),
    pytest.mark.xdist_group("disk faults"),
    pytest.mark.skipif(not can_mount(), reason="this user may not mount a file system in a namespace"),
]

SETTINGS = {
    "data.source.path": "scenes:40:0",
    "train.steps": "10",
    "train.batch_size": "16",
    "train.validate_every": "10",
    "train.checkpoint_every": "10",
    "gate.baselines": "[]",  # a model trained for so few steps may ignore its pictures
    "gate.min_blind_gap": "-10",
}
STAGES: dict[str, tuple[str, ...]] = {
    "ingest": ("ingest", "--set", "data.source.path=scenes:400:1"),
    "shard": ("shard", "--set", "data.shards.rows=7"),
}
"""Dict from each stage to a command that still has work to do in a home folder in which the pipeline has run once."""
FULL = [("ingest", "staged"), ("ingest", "warehouse"), ("shard", "shards")]


def command(*words: str) -> list[str]:
    options = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    stage = [sys.executable, "-P", "-c", "from jobs.cli import main; main()", words[0], "--json"]
    return [*stage, *options, *words[1:]]


def environment(home: Path) -> dict[str, str]:
    variables = os.environ | {"LAKESIGHT_HOME": str(home), "PYTHONPATH": TEST_PATH}
    return {name: value for name, value in variables.items() if not name.startswith("MLFLOW_")}


def report(words: Sequence[str], home: Path) -> dict[str, Any]:
    done = subprocess.run(command(*words), env=environment(home), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder in which the pipeline has run once. Tests work in copies of this folder."""
    home = tmp_path_factory.mktemp("finished") / "home"
    report(["pipeline"], home)
    return home


@pytest.fixture
def home(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "home"))


def assert_one_paragraph(done: subprocess.CompletedProcess[str], cause: str) -> None:
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert cause in done.stderr.splitlines()[-1], done.stderr
    assert done.stdout == ""


def assert_complete(stage: str, home: Path) -> None:
    """Run a command twice without the fault: the first run must complete the work, and the second run must repeat
    nothing.
    """
    found = report(STAGES[stage], home)
    again = report(STAGES[stage], home)
    if stage == "ingest":
        assert found["rows_in"] == found["new"] + found["merged"] + found["duplicates"] + found["quarantined"]
        assert found["rows_in"] in (0, 400)
        assert again["new"] == again["quarantined"] == 0
    else:
        assert all(split["reused"] for split in again.values())


@pytest.mark.parametrize(("stage", "folder"), FULL)
def test_the_error_for_a_full_disk_says_so_and_the_next_command_completes_the_work(
    home: Path, stage: str, folder: str
) -> None:
    (home / folder).mkdir(exist_ok=True)
    done = run_on_small_disk(command(*STAGES[stage]), home / folder, 24, environment(home))
    assert_one_paragraph(done, "No space left on device")
    assert_complete(stage, home)

"""Tests of commands on a full disk: the error is one paragraph, and the next command neither loses nor repeats work."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from disk_faults import can_mount, run_on_small_disk
from home_commands import NEW_WORK, assert_one_paragraph, command, environment, report

pytestmark = [
    pytest.mark.faults,
    pytest.mark.matrix,
    pytest.mark.timeout(1500),
    pytest.mark.xdist_group("disk faults"),
    pytest.mark.skipif(not can_mount(), reason="this user may not mount a file system in a namespace"),
]

FULL = [
    ("ingest", "staged", 24),
    ("ingest", "warehouse", 24),
    ("shard", "shards", 24),
    ("train", "runs", 1500),  # enough space for everything except a checkpoint
    ("train", "mlartifacts", 200),
    ("caption", "staged", 4),
]
"""Tuples of a stage, the folder whose disk is almost full while the stage runs, and the free KiB on this disk."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the pipeline once and return its home folder. Each test gets its own copy of this folder."""
    home = tmp_path_factory.mktemp("finished") / "home"
    report(["pipeline"], home)
    return home


@pytest.fixture
def home(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "home"))


def assert_complete(stage: str, home: Path) -> None:
    """Run a command twice without the fault. The first run must complete the work, the second run must do no work."""
    found = report(NEW_WORK[stage], home)
    again = report(NEW_WORK[stage], home)
    if stage == "ingest":
        assert found["rows_in"] == found["new"] + found["merged"] + found["duplicates"] + found["quarantined"]
        assert found["rows_in"] in (0, 400)
        assert again["new"] == again["quarantined"] == 0
    elif stage == "shard":
        assert all(split["reused"] for split in again.values())
    elif stage == "train":
        assert found["model_version"] == again["model_version"] == "2"
        assert not again["trained"]
    else:
        assert found["considered"] == found["already"] + found["captioned"]
        assert again["already"] == again["considered"] == found["considered"]


@pytest.mark.parametrize(("stage", "folder", "free_kib"), FULL)
def test_the_error_names_the_full_disk_and_the_next_command_completes_the_work(
    home: Path, stage: str, folder: str, free_kib: int
) -> None:
    (home / folder).mkdir(exist_ok=True)
    done = run_on_small_disk(command(*NEW_WORK[stage]), home / folder, free_kib, environment(home))
    assert_one_paragraph(done, "No space left on device")
    assert_complete(stage, home)

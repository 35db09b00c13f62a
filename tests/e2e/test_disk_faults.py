"""Tests of commands on a full or read-only disk: the error is one paragraph, and no work is lost or repeated."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from disk_faults import can_mount, run_on_read_only_disk, run_on_small_disk
from home_commands import NEW_WORK, assert_one_paragraph, command, environment, report

pytestmark = [
    pytest.mark.faults,
    pytest.mark.matrix,
    pytest.mark.timeout(1500),
    pytest.mark.xdist_group("finished home"),
    pytest.mark.skipif(not can_mount(), reason="this user may not mount a file system in a namespace"),
]


class Disk(NamedTuple):
    """A faulty disk: the subfolder of the home folder that is on this disk, and the free space in KiB (None for a
    read-only disk).
    """

    folder: str
    free_kib: int | None


TEMPORARY = "temporary"
"""Folder of temporary files (TMPDIR) in the home of these tests, so that the folder can be on a faulty disk."""

FAULTS = {
    "ingest": [Disk("staged", 24), Disk("warehouse", 24), Disk("warehouse", None)],
    "shard": [Disk("shards", 24)],
    "train": [
        Disk("runs", None),
        Disk("runs", 1500),  # enough space for everything except a checkpoint
        Disk("mlartifacts", 200),
        Disk(TEMPORARY, 200),  # too little space for the files of a model
    ],
    "caption": [Disk("staged", 4)],
}
"""Dict from each stage to faulty disks. The test runs the command of the stage on each of these disks in turn."""


def fail(stage: str, home: Path, disk: Disk) -> None:
    """Run a command on a faulty disk. The command must fail, and its error must name the cause."""
    (folder := home / disk.folder).mkdir(exist_ok=True)
    words, variables = command(*NEW_WORK[stage]), environment(home, TMPDIR=str(home / TEMPORARY))
    if disk.free_kib is None:
        assert_one_paragraph(run_on_read_only_disk(words, folder, variables), "Read-only file system")
    else:
        assert_one_paragraph(run_on_small_disk(words, folder, disk.free_kib, variables), "No space left on device")


def assert_complete(stage: str, home: Path) -> None:
    """Run a command twice without a fault. The first run must complete the work, and the second run must find nothing
    to do.
    """
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
        assert not found["trained"]  # the command that found the artifacts' disk full had completed the training
        assert not again["trained"]
    else:
        assert found["considered"] == found["already"] + found["captioned"]
        assert again["already"] == again["considered"] == found["considered"]


@pytest.mark.parametrize("stage", FAULTS)
def test_the_error_names_the_full_or_read_only_disk_and_the_next_command_completes_the_work(
    finished_home: Path, stage: str
) -> None:
    (finished_home / TEMPORARY).mkdir()
    for disk in FAULTS[stage]:
        fail(stage, finished_home, disk)
    assert_complete(stage, finished_home)

"""Tests of which commands start on a full disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from local_platforms import open_local
from typer.testing import CliRunner

from jobs.cli import app
from jobs.maintain import maintain
from pipelines.errors import UserError
from pipelines.platform import Platform

REFUSED = "too little free disk space"


class Disk(NamedTuple):
    """Stand-in for the result of shutil.disk_usage."""

    total: int
    used: int
    free: int


@pytest.fixture
def full(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Platform:
    """A platform whose home folder is on a disk with 1 MB of free space."""
    platform = open_local(monkeypatch, tmp_path / "home", database=empty_database)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(2**40, 2**40 - 2**20, 2**20))
    return platform


def test_old_folders_are_removed_although_the_disk_is_full(full: Platform) -> None:
    full.folder("reports").mkdir()
    pages = [full.folder("reports") / f"ingest-birds-{number}.html" for number in range(3)]
    for page in pages:
        page.write_text("<p>", encoding="utf-8")
    maintain(keep=1, remove=True)
    assert len([page for page in pages if page.exists()]) == 1


@pytest.mark.parametrize(
    ("line", "starts"),
    [
        *(("show samples", True), ("lineage x", True), ("decisions", True), ("rollback", True)),
        *(("quarantine", True), ("quarantine --gallery", False), ("quarantine replay --reason too_small", False)),
        *(("show samples --gallery", False), ("ingest", False), ("maintain", False), ("caption", False)),
    ],
)
def test_a_full_disk_stops_only_commands_that_write_files(line: str, starts: bool, full: Platform) -> None:
    error = CliRunner().invoke(app, line.split()).exception
    assert (REFUSED in str(error)) != starts
    if not starts:
        assert isinstance(error, UserError)
        assert "`lakesight maintain --keep 3 --remove`" in error.fix

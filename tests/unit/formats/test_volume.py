"""Tests that shards, run folders and atomic writes use only file operations that a Databricks Volume supports."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from processes import TEST_PATH
from volume import COMPILER, Volume

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no gcc, which builds the stand-in for a Volume")

WORK = """
from pathlib import Path
import sys
from tiny_runs import tiny_run, write_run, write_shards
from pipelines.formats.run_folder import Metrics, write_heartbeat, write_json
from pipelines.formats.run_owner import own_run
folder = Path(sys.argv[1])
shards = write_shards(folder / "shards", rows=9)
assert shards.row(8).image_id == "tiny/8"
run = write_run(folder / "run", tiny_run(), shards, shards)
with own_run(run):
    for step in (1, 2):
        write_heartbeat(run, 0, step)
        write_json(run.metrics(1), Metrics(step=1, time=0.0, values={}))
    run.archive_attempt()
"""
MISUSES = {
    "append": "open(path, 'ab')",
    "write at a random position": "os.pwrite(os.open(path, os.O_WRONLY | os.O_TRUNC), b'x', 7)",
    "shared mapping": "mmap.mmap(os.open(path, os.O_RDWR), 0)",
    "hard link": "os.link(path, path + '.2')",
    "resize": "os.truncate(os.open(path, os.O_WRONLY), 100)",
}


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    folder = tmp_path_factory.mktemp("volume")
    return Volume.build(folder / "files", folder / "build")


def run_on(volume: Volume, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": TEST_PATH} | volume.environment
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_shards_and_run_folders_are_written_and_read_on_a_volume(volume: Volume) -> None:
    done = run_on(volume, WORK, str(volume.folder))
    assert done.returncode == 0, done.stderr
    assert volume.refused() == []


@pytest.mark.parametrize("misuse", MISUSES)
def test_the_simulated_volume_refuses_the_file_operations_that_a_real_volume_refuses(
    volume: Volume, misuse: str
) -> None:
    path = volume.folder / "misused"
    path.write_bytes(b"content")
    script = f"import mmap, os, sys\npath = sys.argv[1]\n{MISUSES[misuse]}"
    done = run_on(volume, script, str(path))
    assert "OSError" in done.stderr
    assert volume.refused()[-1].startswith(f"{misuse} {path}")
    volume.refusals.unlink()

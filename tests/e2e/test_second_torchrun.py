"""Test that ranks of a second torchrun command change no file of a run that another process trains."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import torchrun
from run_owners import owned_by_another_process
from tiny_runs import runs_in

from pipelines.formats.run_folder import RunFolder


def content(run: RunFolder) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


@pytest.mark.faults
@pytest.mark.matrix
def test_no_rank_of_a_second_torchrun_command_changes_a_file_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs_in(tmp_path, monkeypatch)()
    with owned_by_another_process(run):
        before = content(run)
        ended = torchrun(run, 3)
        now = content(run)
    assert ended.returncode != 0
    assert "this run is already being trained" in ended.stdout
    assert now.keys() == before.keys()
    assert now == before | {run.launcher: now[run.launcher]}

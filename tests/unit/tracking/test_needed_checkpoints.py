"""Tests of the search for checkpoints that registered model versions need, also for runs of other tracking servers."""

from __future__ import annotations

from pathlib import Path

import pytest
from local_platforms import open_local
from tiny_runs import finish_run, tiny_run, write_run, write_shards

from pipelines.formats.run_folder import write_json
from pipelines.tracking import registry, runs
from pipelines.tracking.download import needed_checkpoints


def test_a_run_needs_its_registered_checkpoints_and_the_need_is_unknown_if_another_server_has_the_run(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = open_local(monkeypatch, tmp_path / "home", database=empty_database)
    config, shards = tiny_run(), write_shards(tmp_path / "shards", rows=6)
    run, other = (write_run(tmp_path / "runs" / name, config, shards, shards) for name in ("tiny-0123", "tiny-4567"))
    finish_run(run)
    with runs.follow(run, config, platform) as follower:
        assert follower.run_id
    registry.register(run, follower.run_id, platform)
    needs = needed_checkpoints(platform)
    assert needs(run) == {"step_000012"}
    assert needs(other) == set(), "this run was never logged"
    write_json(other.tracking, runs.Tracking(run_id="0" * 32))
    assert needs(other) is None

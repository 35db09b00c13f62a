"""Tests of the search for checkpoints that registered model versions need, including runs of other tracking servers."""

from __future__ import annotations

from pathlib import Path

import pytest
from local_platforms import open_local
from tiny_runs import finish_run, tiny_run, write_run, write_shards

from pipelines.driver.train.run_folders import finished_result
from pipelines.errors import UserError
from pipelines.formats.run_folder import write_json
from pipelines.tracking import registry, runs
from pipelines.tracking.checkpoints import find_checkpoint
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


def test_an_earlier_checkpoint_of_an_adapter_run_is_refused_because_it_contains_no_whole_model(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", rows=6)
    adapted = tiny_run(adapter={"pattern": "decoder.*"}, start_from=str(tmp_path))
    for name, config in (("whole", tiny_run()), ("adapted", adapted)):
        run = write_run(tmp_path / name, config, shards, shards)
        finish_run(run)
        run.checkpoint(4).mkdir()
        result = finished_result(run)
        assert result
        assert find_checkpoint(run, result, 12) == run.checkpoint(12)
        if name == "whole":
            assert find_checkpoint(run, result, 4) == run.checkpoint(4)
        else:
            with pytest.raises(UserError, match=r"only the last checkpoint of an adapter run.*step 4.*step 12"):
                find_checkpoint(run, result, 4)

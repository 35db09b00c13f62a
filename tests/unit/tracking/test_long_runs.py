"""Tests that resuming a run of many steps logs the run to MLflow without reading all of its metric files again."""

from __future__ import annotations

from pathlib import Path

import pytest
from file_calls import counted_calls
from local_platforms import open_local
from tiny_runs import log_step, tiny_run, write_run, write_shards

from pipelines.formats.run_files.new_files import MAX_SAMPLED
from pipelines.tracking import runs
from pipelines.tracking.server import connect


def test_a_resumed_run_opens_only_metric_files_whose_points_may_be_missing_in_mlflow(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = open_local(monkeypatch, tmp_path / "home", database=empty_database)
    shards = write_shards(tmp_path / "shards", rows=6)
    run = write_run(tmp_path / "runs" / "tiny-0123", tiny_run(steps=1000), shards, shards)
    config = run.read_run().config
    for step in range(2, 602, 2):
        log_step(run, step)
    with pytest.raises(KeyboardInterrupt), runs.follow(run, config, platform) as first:
        raise KeyboardInterrupt
    log_step(run, 602)
    with counted_calls(run.metrics(0).parent) as calls, runs.follow(run, config, platform):
        pass
    logged = connect(platform).get_metric_history(first.run_id, "loss")
    assert [point.step for point in logged] == list(range(2, 604, 2))
    assert len(calls.opened) < 2 * MAX_SAMPLED + 10  # the logged curves need some of the files

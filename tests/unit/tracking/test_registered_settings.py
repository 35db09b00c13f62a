"""Tests that registering the same weights with other generation settings makes another model version."""

from __future__ import annotations

from pathlib import Path

import pytest
from local_platforms import open_local
from tiny_runs import finished_run, tiny_run

from pipelines.tracking import registry, runs
from pipelines.tracking.download import download
from pipelines.tracking.logged_model import MODEL_FILES
from vlm.checkpoint import load_config


@pytest.mark.matrix  # registers two versions
def test_registering_other_generation_settings_makes_another_model_version_with_the_same_weights(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform, config = open_local(monkeypatch, tmp_path / "home", database=empty_database), tiny_run()
    run, _ = finished_run(platform, tmp_path)
    with runs.follow(run, config, platform) as follower:
        pass
    own, beams = config.model.generation, config.model.generation.changed({"num_beams": 3})
    first = registry.register(run, follower.run_id, platform)
    assert registry.register(run, follower.run_id, platform, "last", own) == first
    other = registry.register(run, follower.run_id, platform, "last", beams)
    assert (first.version, other.version, other.run_id) == ("1", "2", first.run_id)
    assert registry.register(run, follower.run_id, platform, 12, beams) == other
    assert registry.register(run, follower.run_id, platform) == first
    folders = [download(platform, version).folder for version in (first, other)]
    assert [load_config(folder).generation for folder in folders] == [own, beams]
    contents = [{name: (folder / name).read_bytes() for name in MODEL_FILES} for folder in folders]
    assert {name for name in MODEL_FILES if contents[0][name] != contents[1][name]} == {"config.json"}

"""Tests that a damaged checkpoint is not registered."""

from __future__ import annotations

from pathlib import Path

import pytest
from local_platforms import open_local
from tiny_runs import finish_run, tiny_run, write_run, write_shards

from pipelines.errors import StageFailed
from pipelines.formats.run_folder import RunFolder
from pipelines.platform import Platform
from pipelines.tracking import registry, runs
from pipelines.tracking.server import connect
from pipelines.tracking.version_files import digest_tags

CONFIG = tiny_run()


@pytest.fixture
def platform(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Platform:
    return open_local(monkeypatch, tmp_path / "home", database=empty_database)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    shards = write_shards(tmp_path / "shards", rows=6)
    return write_run(tmp_path / "runs" / "tiny-0123", CONFIG, shards, shards)


def test_a_checkpoint_whose_files_were_changed_or_removed_after_it_was_written_is_not_registered(
    platform: Platform, run: RunFolder
) -> None:
    with runs.follow(run, CONFIG, platform) as follower:
        finish_run(run)
    assert follower.run_id
    weights = run.checkpoint(12) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(StageFailed, match=r"damaged checkpoint is not registered.*model\.safetensors has changed"):
        registry.register(run, follower.run_id, platform)
    (run.checkpoint(12) / "files.json").unlink()
    with pytest.raises(StageFailed, match=r"damaged checkpoint is not registered.*files\.json cannot be read"):
        registry.register(run, follower.run_id, platform)
    assert registry.list_versions(connect(platform), platform.model_name("tiny")) == []
    weights.unlink()
    with pytest.raises(StageFailed, match=r"was removed while it was registered.*no model\.safetensors"):
        digest_tags(run.checkpoint(12), "m-1")

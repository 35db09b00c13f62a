"""Tests that a hostile process on the same machine or network cannot execute code in the ranks of a local launch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hostile_peer import rank_with_attacked_ports, rank_with_attacked_store
from tiny_runs import runs_in

from pipelines.driver.train.local_ranks import run_local_ranks
from pipelines.formats.run_folder import Result, read_json

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="the test finds sockets in /proc"),
]


@pytest.mark.matrix  # in each run of the suite, test_pipelines.py checks that processes listen only on loopback
def test_ranks_listen_on_the_loopback_device_only_and_ignore_pickles_sent_to_their_ports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs_in(tmp_path, monkeypatch)()
    assert run_local_ranks(run, 2, rank_with_attacked_ports) is None
    attacks = [json.loads(path.read_text()) for path in (run.path / "attacks").iterdir()]
    assert {address for sent in attacks for address in sent} == {"127.0.0.1"}
    assert not (run.path / "executed").exists()
    assert read_json(run.result, Result).world_size == 2


@pytest.mark.matrix
def test_ranks_load_no_pickle_from_their_rendezvous_store_and_no_other_user_can_open_this_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs_in(tmp_path, monkeypatch)(timeout_seconds=1)
    error = run_local_ranks(run, 2, rank_with_attacked_store)
    assert "ended with exit code" in str(error)  # torch waits for more bytes, which never arrive
    assert json.loads((run.path / "attacks" / "0").read_text()) == {"mode": 0o700}
    assert not (run.path / "executed").exists()

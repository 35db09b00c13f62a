"""Test of ranks on two hosts. Two network namespaces, connected by a virtual cable, simulate the hosts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rank_faults import wait_for
from spark_drivers import started_processes
from tiny_runs import runs_in

from pipelines.driver.train.failure import diagnose_failure
from pipelines.formats.run_folder import RunFolder, step_of

# The test takes a minute, because the test starts ranks twice and waits for a timeout.
pytestmark = [pytest.mark.faults, pytest.mark.matrix]

NAMES = tuple(f"lakesight-{os.getpid()}-{letter}" for letter in "ab")
ADDRESSES = ("198.18.77.1", "198.18.77.2")  # addresses that RFC 2544 reserves for network tests
NODE = """hostname "$0" && exec "$@" """


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def set_link(state: str) -> None:
    """Set the network link between the two hosts to the state `down` or `up`."""
    ip("-n", NAMES[0], "link", "set", "eth0", state)


@pytest.fixture
def network() -> Iterator[None]:
    """Create two network namespaces with a veth pair between them. In both namespaces, the names of the two hosts can
    be resolved.
    """
    if os.geteuid() or not (shutil.which("ip") and shutil.which("unshare")):
        pytest.skip("network namespaces need root and the programs ip and unshare")
    files = [Path("/etc/netns", name) for name in NAMES]
    try:
        ip("netns", "add", NAMES[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be created: {error.stderr}")
    try:
        ip("netns", "add", NAMES[1])
        ip("link", "add", "eth0", "netns", NAMES[0], "type", "veth", "peer", "name", "eth0", "netns", NAMES[1])
        for name, address, folder in zip(NAMES, ADDRESSES, files, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
            folder.mkdir(parents=True)
            known = zip(("127.0.0.1", *ADDRESSES), ("localhost", *NAMES), strict=True)
            (folder / "hosts").write_text("".join(f"{where} {who}\n" for where, who in known))
        yield
    finally:
        for name, folder in zip(NAMES, files, strict=True):
            subprocess.run(["ip", "netns", "del", name], check=False)
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def torchrun_on_both(run: RunFolder) -> Iterator[None]:
    """While the block runs, run the torchrun command from docs/training.md on each of the two hosts."""
    ranks = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", NAMES[0], "--master-port", "29500"]
    command = [sys.executable, "-m", "torch.distributed.run", *ranks]
    worker = ["-m", "pipelines.worker.main", "--run-dir", str(run.path)]
    with started_processes() as start:
        for number, name in enumerate(NAMES):
            in_namespace = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", NODE, name]
            ranked = [*command, "--node-rank", str(number), *worker]
            start([*in_namespace, *ranked], dict(os.environ), subprocess.DEVNULL)
        yield


@pytest.mark.usefixtures("network")
def test_ranks_without_a_network_fail_at_their_timeout_and_a_new_launch_resumes_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs_in(tmp_path, monkeypatch)(steps=100_000, validate_every=100_000, checkpoint_every=20, timeout_seconds=10)
    with torchrun_on_both(run):
        wait_for(lambda: len(run.finished_checkpoints()) > 0, seconds=120)
        set_link("down")
        wait_for(lambda: len(run.read_failures()) == 2, seconds=60)
    error = diagnose_failure(run, 2, None)
    assert re.fullmatch(r"the ranks lost their connections to each other at step \d+", error.what)
    assert error.where == f"hosts {', '.join(NAMES)}"
    assert re.fullmatch(
        r"rank \d waited 1\d s for other ranks in a collective operation, and all other ranks waited too", error.got
    )

    set_link("up")
    done = step_of(run.finished_checkpoints()[-1])
    with torchrun_on_both(run):
        wait_for(lambda: step_of(run.finished_checkpoints()[-1]) > done, seconds=120)
    assert step_of(run.finished_checkpoints()[-1]) > done
    assert f"2 ranks, this rank on cpu, from step {done} to" in run.log(1).read_text()

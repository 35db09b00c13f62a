"""Tests of the ownership of a run folder: a second process is refused, and an ended process blocks no other process."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from run_owners import owned_by_another_process

from pipelines.child_process import pid_namespace, start_ticks
from pipelines.errors import StageFailed, UserError
from pipelines.formats import run_owner
from pipelines.formats.run_folder import RunFolder, read_json, write_json
from pipelines.formats.run_owner import Lease, own_run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(run_owner, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(run_owner, "WATCH_SECONDS", 0.5)
    monkeypatch.setattr(run_owner, "POLL_SECONDS", 0.05)
    return RunFolder(tmp_path / "run")


def elsewhere(**values: object) -> Lease:
    """Return a lease in the form in which a process on another host writes it."""
    lease = Lease(host="elsewhere", pid=os.getpid(), boot="another kernel", owner="other", renewals=3)
    return lease.model_copy(update=values)


def test_a_run_that_another_process_owns_is_refused_and_the_error_names_the_process(run: RunFolder) -> None:
    with owned_by_another_process(run) as owner:
        before = run.launcher.read_bytes()
        with pytest.raises(UserError, match=f"process {owner.pid} on host .* owns the run"), own_run(run):
            pass
        assert run.launcher.read_bytes() == before
    with own_run(run):  # the first owner was killed, so its lock is free and nobody waits for the end of its lease
        assert read_json(run.launcher, Lease).pid == os.getpid()
    assert not run.launcher.exists()


def test_a_stale_lease_of_this_host_does_not_block_a_run_even_if_its_process_id_is_in_use_again(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_owner, "WATCH_SECONDS", 600)
    here = {"boot": run_owner._boot_id(), "pid_namespace": pid_namespace()}
    write_json(run.launcher, elsewhere(**here, start_ticks=start_ticks(os.getpid()) + 1))
    started = time.monotonic()
    with own_run(run):
        assert time.monotonic() - started < 60, "the process watched the lease, instead of taking it at once"


CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
"""Command that starts a process in a pid namespace of its own, as in a container."""


@pytest.mark.parametrize("container", [(), CONTAINER], ids=["same-container", "other-container"])
def test_a_process_of_this_host_keeps_its_run_if_a_lock_is_visible_only_in_one_mount_of_the_file_system(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, container: tuple[str, ...]
) -> None:
    if container and (not shutil.which("unshare") or subprocess.run([*container, "true"], check=False).returncode):
        pytest.skip("pid namespaces need root and the program unshare")
    monkeypatch.setattr(run_owner, "WATCH_SECONDS", 60)
    with owned_by_another_process(run, *container):
        # In another mount of a FUSE file system without locks, the kernel grants the lock a second time.
        monkeypatch.setattr(fcntl, "flock", lambda *_: None)
        with pytest.raises(UserError, match="this run is already being trained"), own_run(run):
            pass


def test_the_lease_of_a_newer_version_with_further_keys_is_respected(run: RunFolder) -> None:
    def write(renewals: int) -> None:
        write_json(run.launcher, elsewhere(renewals=renewals).model_dump() | {"added_later": 1})

    write(3)
    threading.Timer(0.2, write, [4]).start()
    with pytest.raises(UserError, match="on host elsewhere owns the run"), own_run(run):
        pass


@pytest.mark.parametrize("content", ['{"host": "elsewhere", "pid": 1}', "", "[]", "\x00\x00"])
def test_a_lease_of_an_older_version_or_a_damaged_lease_does_not_block_a_run(run: RunFolder, content: str) -> None:
    run.path.mkdir()
    run.launcher.write_text(content)
    with own_run(run):
        assert read_json(run.launcher, Lease).pid == os.getpid()


def test_a_lease_that_another_host_renews_is_respected_even_if_the_clocks_of_the_hosts_differ(run: RunFolder) -> None:
    write_json(run.launcher, elsewhere())
    os.utime(run.launcher, (0, 0))  # the clock of the other host is decades behind
    threading.Timer(0.2, lambda: write_json(run.launcher, elsewhere(renewals=4))).start()
    with pytest.raises(UserError, match="on host elsewhere owns the run"), own_run(run):
        pass
    assert read_json(run.launcher, Lease) == elsewhere(renewals=4)


def test_a_lease_that_another_host_no_longer_renews_is_taken_over_even_if_the_clocks_differ(run: RunFolder) -> None:
    write_json(run.launcher, elsewhere())
    ahead = time.time() + 1e6
    os.utime(run.launcher, (ahead, ahead))
    with own_run(run):
        assert read_json(run.launcher, Lease).owner != "other"


def test_a_lease_is_read_again_if_its_file_was_replaced_during_the_read(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(run.launcher, elsewhere())
    stale, read = [2], Path.read_text

    def read_replaced(path: Path, *args: Any, **options: Any) -> str:
        if path == run.launcher and stale[0]:
            stale[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", read_replaced)
    threading.Timer(0.2, lambda: write_json(run.launcher, elsewhere(renewals=4))).start()
    with pytest.raises(UserError, match="on host elsewhere owns the run"), own_run(run):
        pass
    assert stale == [0]


def test_a_lease_protects_a_run_on_a_file_system_that_supports_no_locks(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with own_run(run), pytest.raises(UserError, match="this run is already being trained"), own_run(run):
        pass


@pytest.mark.parametrize("sigint", [signal.default_int_handler, signal.SIG_IGN], ids=["foreground", "background"])
def test_an_owner_renews_its_lease_and_stops_if_another_host_has_taken_over(
    run: RunFolder, sigint: Any, request: pytest.FixtureRequest
) -> None:
    before = signal.signal(signal.SIGINT, sigint)  # a shell makes a command with `&` ignore SIGINT
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def train() -> None:
        limit = time.monotonic() + 60
        while read_json(run.launcher, Lease).renewals < 2:
            assert time.monotonic() < limit
            time.sleep(0.02)
        while time.monotonic() < limit:  # repeat, because a running renewal may overwrite the first write
            write_json(run.launcher, elsewhere())
            time.sleep(0.1)

    with pytest.raises(StageFailed, match="another process has taken over this run"), own_run(run):
        train()
    assert read_json(run.launcher, Lease) == elsewhere()  # the lease of the new owner is not deleted


def test_a_suspended_owner_stops_if_another_host_has_finished_the_run_and_removed_its_lease(run: RunFolder) -> None:
    def train() -> None:
        limit = time.monotonic() + 60
        while time.monotonic() < limit:  # repeat, because a running renewal may write the lease again
            run.launcher.unlink(missing_ok=True)
            time.sleep(0.02)

    with pytest.raises(StageFailed, match=r"the lease .* of this process is gone"), own_run(run):
        train()
    assert not run.launcher.exists()


def test_an_owner_that_ends_before_its_next_renewal_notices_that_another_host_has_taken_over(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_owner, "RENEW_SECONDS", 600)
    with pytest.raises(StageFailed, match=r"process .* on host elsewhere owns the run"), own_run(run):
        write_json(run.launcher, elsewhere())
    assert read_json(run.launcher, Lease) == elsewhere()

"""Ownership of a run folder, which ensures that only one process at a time trains a run.

Two mechanisms ensure that a run has only one owner: a lock on one host, and a lease across hosts.

On one host, the owner holds a lock of the kernel (flock) on `owner.lock`. The kernel releases the lock when the process
ends in any way. A killed process or a reused process id therefore cannot block a run.

Across hosts, the owner renews a lease: `launcher.json` contains a counter, which the owner increases every few seconds.
A network file system may have no locks (a Databricks Volume has none), and the clocks of two hosts may differ. Another
host therefore watches whether the counter changes, and does not compare times.

Two containers of one host may each mount the file system separately. With some file systems, a lock is then visible
only in one of the containers. Therefore, even a lease that a process of this host wrote is watched. If the process can
be looked up and has ended, the lease is taken over without watching.

An owner may be suspended for so long that another host takes over the run. When the suspended owner continues and
renews its lease, the owner finds the lease of the other host, or no lease if the other host has finished the run. In
both cases, the suspended owner stops.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ConfigDict, ValidationError

from pipelines.background_thread import in_background
from pipelines.child_process import is_running, pid_namespace, start_ticks
from pipelines.errors import StageFailed, UserError
from pipelines.formats.run_folder import RunFolder, write_json
from vlm.config import Config

log = logging.getLogger(__name__)

RENEW_SECONDS = 5.0
"""Time between two renewals of a lease, in seconds."""
WATCH_SECONDS = 30.0
"""A lease counts as abandoned if its counter has not changed for this time, in seconds."""
POLL_SECONDS = 1.0
READ_ATTEMPTS = 5

WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}
"""Error codes with which a file system reports that it does not support locks."""


class Lease(Config):
    """launcher.json: lease of the process that owns the run.

    Older versions of Lakesight wrote only `host` and `pid` into launcher.json. Unknown keys are ignored, so that this
    version can also read a lease that a newer version wrote.
    """

    model_config = ConfigDict(extra="ignore")

    host: str
    pid: int
    boot: str = ""
    """Boot id of the kernel, which is equal in all containers of a machine.

    The boot id is empty in a file that an older version of Lakesight wrote.
    """
    pid_namespace: str = ""
    """Pid namespace in which `pid` identifies the process; empty on systems other than Linux."""
    start_ticks: int = 0
    """Start time of the process, in clock ticks since the boot of the host; 0 on systems other than Linux."""
    owner: str = ""
    """Random id of the owner; empty in a file from an older version of Lakesight, which did not renew leases."""
    renewals: int = 0

    @property
    def process(self) -> tuple[str, str, str, int, int]:
        """Values that together identify the process that wrote the lease."""
        return self.host, self.boot, self.pid_namespace, self.pid, self.start_ticks


class LeaseLost(KeyboardInterrupt):
    """Interrupt of the main thread, because another process has taken over the run. The message gives the reason.

    The class is a KeyboardInterrupt, so that the block in `own_run` stops its ranks and its Spark job as after Ctrl-C.
    """


LOST = signal.SIGUSR1
"""Signal that interrupts the main thread when the lease is lost.

SIGINT is not used, because a shell that starts a command in the background with `&` lets the command ignore SIGINT.
"""


@contextmanager
def own_run(run: RunFolder, *, may_remove: bool = False) -> Iterator[None]:
    """Own a run folder while the block executes.

    Callers enter this block before they change MLflow or any file of the run.

    Args:
        run: run folder.
        may_remove: whether the block may rename or remove the run folder.

    Raises:
        UserError: another process owns the run. No file of the run was changed.
        StageFailed: another process has taken over the run while the block was executing.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    with _host_lock(run):
        lease, reasons = _take_lease(run), list[str]()

        def removed() -> bool:
            return may_remove and not run.path.exists()

        def renew(ended: threading.Event) -> None:
            _renew(run, lease, ended, reasons, removed)

        try:
            with _interruptible(reasons), in_background(renew, "lease"):
                yield
            if not removed() and (reason := _find_loss(run, lease)):
                raise LeaseLost(reason)
        except LeaseLost as error:
            raise StageFailed(
                "another process has taken over this run",
                where=str(run.path),
                got=str(error),
                fix="let the other process finish the run",
            ) from None
        finally:
            _remove_lease(run, lease)


def is_owned_elsewhere(run: RunFolder) -> bool:
    """Return whether a process other than this one has the lease of a run. If the lease cannot be read, log a warning
    and return False.
    """
    try:
        found = _read_lease(run)
    except OSError as error:
        log.warning("the lease of run %s cannot be read: %s", run.path.name, error)
        return False
    return found is not None and bool(found.owner) and found.process != _own_lease().process


@contextmanager
def _interruptible(reasons: list[str]) -> Iterator[None]:
    """Raise LeaseLost in the main thread if the process receives the signal LOST while the block executes.

    Args:
        reasons: list that contains the reason of the loss when the signal arrives.
    """

    def interrupt(*_: object) -> None:
        raise LeaseLost(*reasons)

    before = signal.signal(LOST, interrupt)
    try:
        yield
    finally:
        signal.signal(LOST, before)


@contextmanager
def _host_lock(run: RunFolder) -> Iterator[None]:
    """Hold the kernel's lock on the file `owner.lock` of a run, if the file system has locks."""
    with os.fdopen(os.open(run.owner_lock, os.O_RDWR | os.O_CREAT, 0o666), "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _already_owned(run, _read_lease(run)) from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
        yield


def _take_lease(run: RunFolder) -> Lease:
    """Check that no other process still renews a lease of the run, and then write the lease of this process."""
    found, lease = _read_lease(run), _own_lease()
    if found and not _is_abandoned(found, lease) and _is_renewed(run, found):
        raise _already_owned(run, found)
    write_json(run.launcher, lease)
    return lease


def _own_lease() -> Lease:
    """Return a new lease of this process, with a random owner id."""
    pid = os.getpid()
    return Lease(
        host=socket.gethostname(),
        pid=pid,
        boot=_boot_id(),
        pid_namespace=pid_namespace(),
        start_ticks=start_ticks(pid),
        owner=uuid.uuid4().hex,
    )


def _is_abandoned(found: Lease, own: Lease) -> bool:
    """Return whether a lease can be taken over at once, because its process has ended or never renewed leases.

    The process of the lease can be looked up only if it has the same kernel and the same pid namespace as this process.
    """
    here = (found.boot, found.pid_namespace) == (own.boot, own.pid_namespace)
    return not found.owner or (here and not is_running(found.pid, found.start_ticks))


def _is_renewed(run: RunFolder, found: Lease) -> bool:
    """Watch the lease of another process, and return whether its owner still renews the lease."""
    log.info(
        "watching for up to %.0f s whether process %d on host %s still trains run %s",
        WATCH_SECONDS,
        found.pid,
        found.host,
        run.path.name,
    )
    deadline = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        now = _read_lease(run)
        if now is None:
            return False
        if now != found:
            return True
    return False


def _renew(
    run: RunFolder, lease: Lease, ended: threading.Event, reasons: list[str], removed: Callable[[], bool]
) -> None:
    """Renew the lease until the block ends. If another process has taken the lease, add the reason to `reasons`, and
    interrupt the main thread. If the block itself has removed the run folder, do not renew the lease.
    """
    renewals = 0
    while not ended.wait(RENEW_SECONDS):
        try:
            if removed():
                return
            if reason := _find_loss(run, lease):
                reasons.append(reason)
                signal.pthread_kill(threading.main_thread().ident or 0, LOST)
                return
            renewals += 1
            write_json(run.launcher, lease.model_copy(update={"renewals": renewals}))
        except OSError as error:
            log.warning("the lease of run %s cannot be renewed (%s); trying again", run.path.name, error)


def _find_loss(run: RunFolder, lease: Lease) -> str:
    """Return why this process no longer owns the run, or an empty string if the lease of this process is still valid.

    Raises:
        OSError: the lease cannot be read.
    """
    found = _read_lease(run)
    if found is None:
        time.sleep(POLL_SECONDS)  # a network file system may show a renamed file a moment later
        found = _read_lease(run)
    if found is None:
        return (
            f"the lease {run.launcher.name} of this process is gone: another process has trained the run and has "
            "ended while this process was suspended, or somebody has removed the file"
        )
    if found.owner == lease.owner:
        return ""
    return (
        f"process {found.pid} on host {found.host} owns the run, because this process was suspended, or could not "
        f"write into the run folder, for more than {WATCH_SECONDS:.0f} s"
    )


def _remove_lease(run: RunFolder, lease: Lease) -> None:
    """Remove launcher.json if the file contains the lease of this process. If the removal fails, log a warning."""
    try:
        found = _read_lease(run)
        if found and found.owner == lease.owner:
            run.launcher.unlink(missing_ok=True)
    except OSError as error:
        log.warning("the lease of run %s cannot be removed: %s", run.path.name, error)


def _read_lease(run: RunFolder) -> Lease | None:
    """Read the lease, or return None if the file is missing or does not contain a lease.

    On a network file system, a read may fail with ESTALE if the owner replaces the file at that moment. The read is
    then repeated, up to READ_ATTEMPTS reads in total.
    """
    for attempts_left in reversed(range(READ_ATTEMPTS)):
        try:
            return Lease.model_validate_json(run.launcher.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValidationError, UnicodeDecodeError):
            return None
        except OSError as error:
            if error.errno != errno.ESTALE or not attempts_left:
                raise
    return None


def _already_owned(run: RunFolder, lease: Lease | None) -> UserError:
    heartbeat = run.read_heartbeat(0)
    step = f", which has reached step {heartbeat.step}" if heartbeat else ""
    owner = f"process {lease.pid} on host {lease.host}" if lease else "another process"
    return UserError(
        "this run is already being trained",
        where=str(run.path),
        got=f"{owner} owns the run{step}",
        fix="wait until that process ends, or end it, then repeat the command; the other process was not disturbed",
    )


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()

"""Launch of ranks as child processes of the driver. The ranks open no port that other hosts can reach.

On one machine, torchrun is not used. The rendezvous of `torchrun --standalone` listens on every network interface and
unpickles what a peer sends, so anybody on the network could execute code. Instead, the ranks meet in a file store,
which is a file in a folder that only this user can open. gloo and NCCL are bound to the loopback device.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from pipelines.child_process import child_environment
from pipelines.formats.run_folder import RunFolder

logger = logging.getLogger(__name__)

RankEntry = Callable[[str], None]

POLL_SECONDS = 0.1
TERM_SECONDS = 15.0
"""Time in seconds between SIGTERM and SIGKILL, in which a rank can record how it ended."""

KILL_SECONDS = 10.0
"""Time in seconds that ranks may take to end after SIGKILL. The kernel does not end a process that waits for a dead
network file system or device."""


def run_local_ranks(run: RunFolder, ranks: int, entry: RankEntry) -> Exception | None:
    """Run all ranks on this host until they end. Return an exception with the first failure, or None.

    If a rank fails, all other ranks are ended. When this function returns or raises, all ranks have ended, except a
    rank that the kernel could not end within KILL_SECONDS. A warning names the process of such a rank.

    Args:
        run: run folder. Until a rank has opened its own log, the rank's output goes to launcher.log.
        ranks: number of ranks.
        entry: function that each rank runs; each rank imports the function by name.

    Raises:
        KeyboardInterrupt: the user interrupted the run.
    """
    run.launcher_log.parent.mkdir(parents=True, exist_ok=True)
    import_entry = f"import sys; from {entry.__module__} import {entry.__name__} as entry; entry(sys.argv[1])"
    command = [sys.executable, "-P", "-c", import_entry, str(run.path)]
    started: list[subprocess.Popen[bytes]] = []
    with (
        tempfile.TemporaryDirectory(prefix="lakesight-ranks-") as private,
        run.launcher_log.open("ab", buffering=0) as log,
        _copied_to(log) as console,
    ):
        try:
            for rank in range(ranks):
                environment = _rank_environment(rank, ranks, Path(private) / "store")
                started.append(
                    subprocess.Popen(  # noqa: S603 (our own command)
                        command, env=environment, stdin=subprocess.DEVNULL, stdout=console, stderr=log
                    )
                )
            return _wait(started)
        except OSError as error:
            return error
        finally:
            _end(started)


@contextmanager
def _copied_to(log: IO[bytes]) -> Iterator[int]:
    """Yield a file descriptor whose input this process appends to a file.

    A rank whose own files reach a limit, such as RLIMIT_FSIZE, can therefore still say why it ends.
    """
    read_end, write_end = os.pipe()

    def copy() -> None:
        with os.fdopen(read_end, "rb", buffering=0) as output:
            while part := output.read(1 << 16):
                with suppress(OSError, ValueError):  # the disk is full, or `log` is closed; the ranks must not wait
                    log.write(part)

    thread = threading.Thread(target=copy, daemon=True, name="output of ranks")
    thread.start()
    try:
        yield write_end
    finally:
        os.close(write_end)
        thread.join(KILL_SECONDS)  # a rank that the kernel could not end keeps its end of the pipe open


def _rank_environment(rank: int, ranks: int, store: Path) -> dict[str, str]:
    """Return the environment variables of a rank: its number and the number of ranks (as torchrun sets them), the file
    store, the driver's process id and the loopback device.
    """
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")
    environment = child_environment(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        LAKESIGHT_STORE=str(store),
        LAKESIGHT_LAUNCHER=str(os.getpid()),
        GLOO_SOCKET_IFNAME=loopback,
        NCCL_SOCKET_IFNAME=loopback,
    )
    # Each rank sets its number of threads itself. Until then, OMP_NUM_THREADS is 1 if there are several ranks and the
    # variable is not already set, as with torchrun. Libraries then do not start one thread per core.
    return environment if ranks == 1 else {"OMP_NUM_THREADS": "1"} | environment


def _wait(started: Sequence[subprocess.Popen[bytes]]) -> RuntimeError | None:
    """Wait until all ranks have succeeded (return None) or a rank has failed (return an error that names the rank)."""
    while True:
        codes = [process.poll() for process in started]
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None:
            return RuntimeError(f"rank {failed} ended with exit code {codes[failed]}")
        if None not in codes:
            return None
        time.sleep(POLL_SECONDS)


def _end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the ranks that are still running.

    Signals reach only child processes of this process, because `Popen` sends no signal to a process that has been
    reaped.
    """
    for process in started:
        process.terminate()
    deadline = time.monotonic() + TERM_SECONDS
    while any(process.poll() is None for process in started) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS / 2)
    for process in started:
        process.kill()
    deadline = time.monotonic() + KILL_SECONDS
    for process in started:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            logger.warning(
                "process %d of a rank waits for a disk or a device, and ends only when the disk or the device answers",
                process.pid,
            )

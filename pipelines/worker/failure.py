"""How a rank ends, written down by the rank itself, whatever ends it.

A launcher only ever says "exit code 1, see the logs". Here a rank leaves a record that tells the root of a failure from
its consequences: a rank that was told to stop, or lost its connection because another one died, says so.

Unusual: SIGTERM and SIGINT are not handled where Python handles signals, in the main thread, because that thread sits
in a C++ collective when another rank has died and would not come back. The signal's number is written to a pipe by
the C-level handler, and a thread that reads the pipe leaves the record and ends the process. The same thread notices
that the launcher is gone, so no rank outlives it.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from types import FrameType, TracebackType
from typing import Self

from pipelines.rundir import Failure, RankFile, RunDir, touch_heartbeat, write_json

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
WATCH_SECONDS = 1.0
LEAVE_SECONDS = 5
_ENDINGS = (signal.SIGTERM, signal.SIGINT)

_LOST_CONNECTION = (
    "connection closed by peer",
    "connection reset by peer",
    "connection was closed",
    "broken pipe",
    "timed out waiting",
    "timeout caused pair closure",
    "gloo/transport",
    "nccl error",
    "remote process exited",
)


def is_consequence(error: BaseException) -> bool:
    """Whether an error only tells of another rank's death: a broken collective, or an interrupt from outside."""
    if isinstance(error, KeyboardInterrupt):
        return True
    collective = any(kind.__name__ == "DistError" for kind in type(error).__mro__)  # torch's, without importing it
    text = str(error).lower()
    return collective or (isinstance(error, RuntimeError) and any(sign in text for sign in _LOST_CONNECTION))


class Watch:
    """Watches over one rank, as a context manager around everything it does.

    It says who the rank is at the start and that it is done at the end, counts its steps, keeps its heartbeat, and
    records any other way in which it ends. An error goes on its way after it is recorded; the process has five
    seconds to follow, because a thread or a communicator that does not stop must not keep the launcher waiting.
    """

    def __init__(self, run: RunDir, rank: int) -> None:
        self.step = 0
        """Steps the run has taken; part of every record."""
        self._run, self._rank = run, rank
        self._started = time.time()
        self._beaten = 0.0
        self._lock = threading.Lock()
        self._recorded = False
        self._launcher = os.getppid()
        self._inbox, self._outbox = os.pipe()

    def at(self, step: int) -> None:
        """Say that the rank is alive and the run has taken `step` steps; reaches the disk at most once a second."""
        self.step = step
        now = time.monotonic()
        if now - self._beaten >= HEARTBEAT_SECONDS:
            self._beaten = now
            touch_heartbeat(self._run, self._rank, step)

    def __enter__(self) -> Self:
        self._run.failure(self._rank).unlink(missing_ok=True)
        self._introduce(ended=False)
        touch_heartbeat(self._run, self._rank, self.step)
        os.set_blocking(self._outbox, False)
        for number in _ENDINGS:
            signal.signal(number, _leave_to_thread)
        signal.set_wakeup_fd(self._outbox, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            with self._lock:
                self._recorded = True
            touch_heartbeat(self._run, self._rank, self.step)
            self._introduce(ended=True)
            return
        message = (
            f"left at step {self.step} with exit code {error.code}" if isinstance(error, SystemExit) else str(error)
        )
        self._record(type(error).__name__, message, "".join(traceback.format_exception(error)), is_consequence(error))

    def _listen(self) -> None:
        while True:
            ready, _, _ = select.select([self._inbox], [], [], WATCH_SECONDS)
            number = os.read(self._inbox, 1)[0] if ready else 0
            if number in _ENDINGS:
                self._end(signal.Signals(number).name, "the launcher ended this rank", 128 + number)
            elif os.getppid() != self._launcher:
                self._end("LauncherGone", "the process that started this rank is gone", 1)

    def _end(self, name: str, message: str, code: int) -> None:
        stack = traceback.format_stack(sys._current_frames()[threading.main_thread().ident or 0])
        self._record(name, message, "".join(stack), consequence=True)
        os._exit(code)

    def _record(self, name: str, message: str, trace: str, consequence: bool) -> None:
        faulthandler.dump_traceback_later(LEAVE_SECONDS, exit=True)
        with self._lock:  # the first reason counts: a rank that is told to stop while it fails has failed
            if self._recorded:
                return
            self._recorded = True
            failure = Failure(
                rank=self._rank,
                host=socket.gethostname(),
                pid=os.getpid(),
                exception=name,
                message=message,
                traceback=trace,
                step=self.step,
                failed_at=time.time(),
                consequence=consequence,
            )
            write_json(self._run.failure(self._rank), failure)
        log.error("rank %d ended at step %d: %s: %s\n%s", self._rank, self.step, name, message, trace)

    def _introduce(self, *, ended: bool) -> None:
        who = RankFile(
            rank=self._rank, host=socket.gethostname(), pid=os.getpid(), started_at=self._started, ended=ended
        )
        write_json(self._run.rank(self._rank), who)


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """The signal's number is in the pipe already; see the module's docstring."""

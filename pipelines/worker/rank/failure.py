"""How a rank ends, written down by the rank itself, whatever ends it.

A launcher only ever says "exit code 1, see the logs". Here a rank leaves a record that tells the root of a failure from
its consequences: a rank that was told to stop, or lost its connection because another one died, says so.

Unusual: SIGTERM and SIGINT are not handled where Python handles signals, in the main thread, because that thread sits
in a C++ collective when another rank has died and would not come back. The signal's number is written to a pipe by
the C-level handler, and a thread that reads the pipe leaves the record and ends the process. The same thread notices
that the launcher is gone, so no rank outlives it, and that nothing goes on any more: when a rank hangs, the others wait
for it, so all of them run out of time at once, and each leaves the stacks of its threads. Who waits in a collective is
not to blame. A thread in C, which needs no interpreter, ends a rank whose interpreter itself is stuck.
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

from pipelines.errors import LakesightError
from pipelines.formats.run_folder import Failure, RankFile, RunDir, touch_heartbeat, write_json

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
WATCH_SECONDS = 1.0
LEAVE_SECONDS = 5
LAST_WORD_SECONDS = 3.0
"""How much longer a rank waits that waits for others, so that who hangs speaks first."""
START_SECONDS = 600.0
"""How long a rank may take until it knows `train.timeout_seconds`: torch is imported in that time."""
_ENDINGS = (signal.SIGTERM, signal.SIGINT)

_WAITING = ("torch/distributed/", "torch/nn/parallel/", "torch/autograd/", "vlm/training/parallel.py")
"""Files whose functions wait for other ranks; in `backward` DDP adds up gradients."""

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
    """Whether an error only tells of another rank's: a broken collective, a loss that was not finite elsewhere, or an
    interrupt from outside."""
    if isinstance(error, KeyboardInterrupt) or getattr(error, "on_other_rank", False):
        return True
    collective = any(kind.__name__ == "DistError" for kind in type(error).__mro__)  # torch's, without importing it
    text = str(error).lower()
    return collective or (isinstance(error, RuntimeError) and any(sign in text for sign in _LOST_CONNECTION))


class Watch:
    """Watches over one rank, as a context manager around everything it does.

    It says who the rank is at the start and that it is done at the end, counts its steps, keeps its heartbeat, ends it
    when nothing goes on for too long, and records any other way in which it ends. An error goes on its way after it is
    recorded; the process has five seconds to follow, because a thread or a communicator that does not stop must not
    keep the launcher waiting.
    """

    def __init__(self, run: RunDir, rank: int) -> None:
        self.step = 0
        """Steps the run has taken; part of every record."""
        self._run, self._rank = run, rank
        self._started = time.time()
        self._beaten = 0.0
        self._limit, self._moved = START_SECONDS, time.monotonic()
        self._lock = threading.Lock()
        self._recorded = False
        self._launcher = os.getppid()
        self._inbox, self._outbox = os.pipe()

    def at(self, step: int) -> None:
        """Say that the rank is alive and the run has taken `step` steps; reaches the disk at most once a second."""
        self.step = step
        self.alive()
        now = time.monotonic()
        if now - self._beaten >= HEARTBEAT_SECONDS:
            self._beaten = now
            touch_heartbeat(self._run, self._rank, step)

    def alive(self) -> None:
        """Say that work goes on, where it does without a step: while a model is read, or captions are made."""
        self._moved = time.monotonic()

    def allow(self, seconds: float) -> None:
        """From now on the rank may go without a sign of work for this long."""
        self._limit = seconds
        self.alive()
        self._arm()

    def __enter__(self) -> Self:
        for left in (self._run.failure(self._rank), self._run.stacks(self._rank)):
            left.unlink(missing_ok=True)
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
                faulthandler.cancel_dump_traceback_later()
            touch_heartbeat(self._run, self._rank, self.step)
            self._introduce(ended=True)
            return
        message = str(error)
        if isinstance(error, SystemExit):
            message = f"left at step {self.step} with exit code {error.code}"
        self._record(
            type(error).__name__,
            message,
            "".join(traceback.format_exception(error)),
            consequence=is_consequence(error),
            lasting=isinstance(error, LakesightError) and error.lasting,
        )

    def _listen(self) -> None:
        while True:
            self._arm()
            ready, _, _ = select.select([self._inbox], [], [], WATCH_SECONDS)
            number = os.read(self._inbox, 1)[0] if ready else 0
            if number in _ENDINGS:
                self._end(signal.Signals(number).name, "the launcher ended this rank", 128 + number)
            elif os.getppid() != self._launcher:
                self._end("LauncherGone", "the process that started this rank is gone", 1)
            elif (seconds := time.monotonic() - self._moved) > self._limit:
                self._run_out(seconds)

    def _arm(self) -> None:
        """Have the rank ended by a thread in C, should no thread of Python be able to."""
        with self._lock:
            if not self._recorded:
                faulthandler.dump_traceback_later(self._limit + 2 * LAST_WORD_SECONDS, exit=True)

    def _run_out(self, seconds: float) -> None:
        """Nothing goes on. A rank that waits gives the one it waits for the first word."""
        if not _waits(_main_frame()):
            self._end("Hung", f"did nothing for {seconds:.0f} s (train.timeout_seconds)", 1, consequence=False)
        if seconds > self._limit + LAST_WORD_SECONDS:
            self._end("Waited", f"waited {seconds:.0f} s for other ranks, which did not come", 1)

    def _end(self, name: str, message: str, code: int, *, consequence: bool = True) -> None:
        frame = _main_frame()
        stack = "".join(traceback.format_stack(frame))
        self._record(name, message, stack, consequence=consequence, waiting=_waits(frame))
        os._exit(code)

    def _record(self, name: str, message: str, trace: str, *, consequence: bool, **more: bool) -> None:
        with self._lock:  # the first reason counts: a rank that is told to stop while it fails has failed
            if self._recorded:
                return
            self._recorded = True
            faulthandler.dump_traceback_later(LEAVE_SECONDS, exit=True)
            # First where a full disk does not matter: the launcher's stream reaches the driver.
            log.error("rank %d ended at step %d: %s: %s\n%s", self._rank, self.step, name, message, trace)
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
                **more,
            )
            write_json(self._run.failure(self._rank), failure)
            with self._run.stacks(self._rank).open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)

    def _introduce(self, *, ended: bool) -> None:
        who = RankFile(
            rank=self._rank, host=socket.gethostname(), pid=os.getpid(), started_at=self._started, ended=ended
        )
        write_json(self._run.rank(self._rank), who)


def _main_frame() -> FrameType:
    """Where the main thread is."""
    return sys._current_frames()[threading.main_thread().ident or 0]


def _waits(frame: FrameType) -> bool:
    """Whether the innermost function is one that waits for other ranks."""
    return any(part in frame.f_code.co_filename for part in _WAITING)


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """The signal's number is in the pipe already; see the module's docstring."""

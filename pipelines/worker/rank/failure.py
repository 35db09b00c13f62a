"""Monitor of a rank: heartbeat, timeout, and a failure record written by the rank itself.

torchrun reports only "exit code 1, see the logs". The failure record of a rank distinguishes the root cause from
consequences. Consequences are, for example, a signal from the launcher, or a connection that was lost because another
rank died.

Python's signal handlers are not used for SIGTERM and SIGINT. Python runs a signal handler in the main thread. When
another rank has died, the main thread is blocked in a C++ collective, so the handler would never run. When SIGTERM or
SIGINT arrives, Python's C-level handler writes the signal's number to a pipe. The monitor thread reads the pipe, writes
the failure record and exits the process.

Even without a signal, the monitor thread ends the rank in two cases. If the launcher has died, the rank exits, so that
no rank continues without its launcher. The driver passes its process id to its ranks, so that a rank also notices a
driver that died while the rank was starting. If the rank reports no progress for `train.timeout_seconds`, the rank
writes the stacks of all threads and exits. When one rank hangs, all other ranks wait for this rank and also make no
progress. A rank that is inside a collective is therefore recorded as waiting, not as the cause. The timeout of a
waiting rank is WAITING_EXTRA_SECONDS longer, so that the hanging rank writes its failure record first. If the
interpreter itself is stuck, faulthandler's C thread ends the rank.
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

from pipelines.child_process import start_ticks
from pipelines.errors import LakesightError
from pipelines.formats.run_folder import Failure, RankFile, RunFolder, write_heartbeat, write_json

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5.0
"""Time between two heartbeats, in seconds. Writing the small file of a heartbeat is slow on a network file system."""
WATCH_SECONDS = 1.0
EXIT_SECONDS = 5
"""Seconds that a failed rank may take to exit after its failure record is written."""
WAITING_EXTRA_SECONDS = 3.0
"""Seconds that are added to the timeout of a rank inside a collective.

A rank that hangs therefore writes its failure record before the ranks that wait for the hanging rank.
"""
START_SECONDS = 600.0
"""Timeout in seconds that applies until the rank has read `train.timeout_seconds`, for example while torch is
imported."""
_TERMINATING = (signal.SIGTERM, signal.SIGINT)

_COLLECTIVE_FILES = ("torch/distributed/", "torch/nn/parallel/", "torch/autograd/", "vlm/training/parallel.py")
"""Parts of the paths of code files whose functions wait for other ranks.

The files of autograd belong to the list, because DDP waits for gradients of other ranks in `backward`.
"""

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
    """Return whether an error of this rank was caused by another rank or by an interrupt.

    A broken collective, for example, is caused by another rank. A KeyboardInterrupt is an interrupt.
    """
    if isinstance(error, KeyboardInterrupt) or getattr(error, "on_other_rank", False):
        return True
    # The error class of torch.distributed is compared by name, because this module must not import torch.
    collective = any(kind.__name__ == "DistError" for kind in type(error).__mro__)
    text = str(error).lower()
    return collective or (isinstance(error, RuntimeError) and any(sign in text for sign in _LOST_CONNECTION))


class RankMonitor:
    """Context manager around all the work of one rank.

    The monitor writes the rank's RankFile at the start and at a normal end, writes heartbeats, ends the rank after a
    timeout, and records the first failure. An error inside the `with` block is recorded and raised again. After an
    error, the process has EXIT_SECONDS to exit. A thread or communicator that does not stop therefore cannot block the
    launcher.
    """

    def __init__(self, run: RunFolder, rank: int, launcher: int = 0) -> None:
        """Prepare the monitor.

        Args:
            run: run folder.
            rank: number of the rank.
            launcher: process id of the launcher, which must be the parent of this process. If the number is 0, the
                present parent counts as the launcher.
        """
        self.step = 0
        """Number of steps that the run has taken, which is written into the failure record."""
        self._run, self._rank = run, rank
        self._started = time.time()
        self._ended = threading.Event()
        self._unwritten: OSError | None = None
        """Error of the last heartbeat that could not be written, or None."""
        self._timeout, self._progress_at = START_SECONDS, time.monotonic()
        self._lock = threading.Lock()
        self._recorded = False
        self._launcher = launcher or os.getppid()
        self._read_end, self._write_end = os.pipe()

    def report_step(self, step: int) -> None:
        """Report that the run has taken `step` steps.

        Raises:
            OSError: a heartbeat could not be written.
        """
        self.step = step
        self.report_progress()
        if self._unwritten:
            raise self._unwritten

    def report_progress(self) -> None:
        """Restart the timeout. Call this method during work that is not a training step, such as validation."""
        self._progress_at = time.monotonic()

    def set_timeout(self, seconds: float) -> None:
        """Set the number of seconds that the rank may go without reporting progress."""
        self._timeout = seconds
        self.report_progress()
        self._arm_watchdog()

    def __enter__(self) -> Self:
        for stale in (self._run.failure(self._rank), self._run.stacks(self._rank)):
            stale.unlink(missing_ok=True)
        self._write_rank_file(ended=False)
        write_heartbeat(self._run, self._rank, self.step)
        os.set_blocking(self._write_end, False)
        for number in _TERMINATING:
            signal.signal(number, _ignore_in_main_thread)
        signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        threading.Thread(target=self._monitor, name="monitor", daemon=True).start()
        self._heartbeat = threading.Thread(target=self._write_heartbeats, name="heartbeat", daemon=True)
        self._heartbeat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            with self._lock:
                self._recorded = True
                faulthandler.cancel_dump_traceback_later()
            self._ended.set()
            self._heartbeat.join()
            write_heartbeat(self._run, self._rank, self.step)
            self._write_rank_file(ended=True)
            return
        message = str(error)
        if isinstance(error, SystemExit):
            message = f"exited at step {self.step} with exit code {error.code}"
        self._record(
            type(error).__name__,
            message,
            "".join(traceback.format_exception(error)),
            consequence=is_consequence(error),
            lasting=isinstance(error, LakesightError) and error.permanent,
        )

    def _monitor(self) -> None:
        """Wait for signals, the death of the launcher, or a timeout. This method runs in a thread."""
        while True:
            self._arm_watchdog()
            ready, _, _ = select.select([self._read_end], [], [], WATCH_SECONDS)
            number = os.read(self._read_end, 1)[0] if ready else 0
            if number in _TERMINATING:
                self._end(signal.Signals(number).name, "the rank was terminated by the launcher", 128 + number)
            elif os.getppid() != self._launcher:
                self._end("LauncherGone", "the process that started this rank has died", 1)
            elif (seconds := time.monotonic() - self._progress_at) > self._timeout:
                self._handle_timeout(seconds)

    def _write_heartbeats(self) -> None:
        """Write a heartbeat every HEARTBEAT_SECONDS if the rank has reported progress since the last heartbeat.

        This method runs in its own thread, because a write to a network file system may hang and would block the
        monitor.
        """
        reported = self._progress_at
        while not self._ended.wait(HEARTBEAT_SECONDS):
            if self._progress_at != reported:
                reported = self._progress_at
                try:
                    write_heartbeat(self._run, self._rank, self.step)
                except OSError as error:
                    self._unwritten = error

    def _arm_watchdog(self) -> None:
        """Let faulthandler's C thread end the rank if the interpreter is stuck and no Python thread can run."""
        with self._lock:
            if not self._recorded:
                faulthandler.dump_traceback_later(self._timeout + 2 * WAITING_EXTRA_SECONDS, exit=True)

    def _handle_timeout(self, seconds: float) -> None:
        """End this rank after a timeout, or WAITING_EXTRA_SECONDS later if this rank waits for other ranks."""
        if not _is_waiting(_main_frame()):
            self._end("Hung", f"made no progress for {seconds:.0f} s (train.timeout_seconds)", 1, consequence=False)
        if seconds > self._timeout + WAITING_EXTRA_SECONDS:
            self._end("Waited", f"waited {seconds:.0f} s for other ranks in a collective operation", 1)

    def _end(self, name: str, message: str, code: int, *, consequence: bool = True) -> None:
        frame = _main_frame()
        stack = "".join(traceback.format_stack(frame))
        self._record(name, message, stack, consequence=consequence, waiting=_is_waiting(frame))
        os._exit(code)

    def _record(self, name: str, message: str, trace: str, *, consequence: bool, **more: bool) -> None:
        with self._lock:  # only the first reason is recorded, even if a failing rank also receives a signal
            if self._recorded:
                return
            self._recorded = True
            faulthandler.dump_traceback_later(EXIT_SECONDS, exit=True)
            # Log before the record is written, because log lines reach the driver even if the disk is full.
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

    def _write_rank_file(self, *, ended: bool) -> None:
        content = RankFile(
            rank=self._rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            started_at=self._started,
            start_ticks=start_ticks(os.getpid()),
            ended=ended,
        )
        write_json(self._run.rank(self._rank), content)


def _main_frame() -> FrameType:
    """Return the current stack frame of the main thread."""
    return sys._current_frames()[threading.main_thread().ident or 0]


def _is_waiting(frame: FrameType) -> bool:
    """Return whether the function of a stack frame waits for other ranks."""
    return any(part in frame.f_code.co_filename for part in _COLLECTIVE_FILES)


def _ignore_in_main_thread(number: int, frame: FrameType | None) -> None:
    """Ignore a signal whose number Python's C-level handler has already written to the pipe."""

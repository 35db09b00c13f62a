"""A time limit on a block of code, set with two interval timers of the process."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PROCESS_LIMIT = 2
"""The process is killed when the user CPU time of the block exceeds PROCESS_LIMIT times the time limit. If this product
is less than MIN_PROCESS_SECONDS, the process is killed after MIN_PROCESS_SECONDS of user CPU time."""
MIN_PROCESS_SECONDS = 1.0


class TimeLimitExceeded(BaseException):
    """Exception for a block that took longer than its time limit.

    The base class is BaseException, because image decoders may catch every Exception.
    """


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt the block after a number of seconds.

    A Python signal handler cannot interrupt C code, and the C code of an image decoder may loop forever. Two timers are
    therefore set. The first timer (SIGALRM) raises an exception as soon as Python code runs again. The second timer
    (SIGVTALRM) ends the process without running Python code. The second timer expires after PROCESS_LIMIT * `seconds`
    of user CPU time, or after MIN_PROCESS_SECONDS if this time is longer. CPU time is used because a healthy process
    may be slow on a busy machine. When the process has ended, `pipelines.executor.crash_guard` finds the row that
    exceeded the limit.

    The block must run in the main thread, in which Spark's Python workers run our functions.

    Raises:
        TimeLimitExceeded: the block took longer than `seconds`.
    """

    def on_alarm(_: int, __: FrameType | None) -> None:
        raise TimeLimitExceeded

    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_VIRTUAL, max(MIN_PROCESS_SECONDS, PROCESS_LIMIT * seconds))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGALRM, previous)

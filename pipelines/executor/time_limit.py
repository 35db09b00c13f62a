"""A time limit on a block of code, set with the interval timer of the process (SIGALRM)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TimeLimitExceeded(BaseException):
    """Exception for a block that took longer than its time limit.

    The base class is BaseException, because image decoders may catch every Exception.
    """


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt the block after a number of seconds. C code in the block is interrupted when it returns to Python.

    Signals reach only the main thread, in which Spark's Python workers run our functions. In any other thread the block
    has no time limit.

    Raises:
        TimeLimitExceeded: the block took longer than `seconds`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_alarm(_: int, __: FrameType | None) -> None:
        raise TimeLimitExceeded

    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)

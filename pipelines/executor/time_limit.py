"""A time limit on a block of code, by the process's interval timer (SIGALRM)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TimeLimitExceeded(BaseException):
    """The block took too long. Not an Exception, because code inside the block (image decoders) may catch those."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt the block after some seconds. Code in C is interrupted when it returns to Python.

    Signals reach the main thread only, where Spark's Python workers run our functions. In any other thread there is
    no limit.

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

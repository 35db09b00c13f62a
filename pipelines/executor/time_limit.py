"""A limit on the time that one row may take, by the process's alarm clock."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TimeUp(BaseException):
    """The time is up. No Exception: what runs inside the limit may catch those, and decoders' callers do."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End what runs inside after some seconds, as soon as it is back in Python: a decoder in C is when it returns.

    An alarm clock belongs to the main thread, where Spark's Python workers run our functions; elsewhere nothing is
    limited.

    Raises:
        TimeUp: the time is up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_: int, __: FrameType | None) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

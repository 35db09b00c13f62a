"""A context manager that runs a function in a background thread while a block executes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def in_background(function: Callable[[threading.Event], object], name: str) -> Iterator[None]:
    """Run `function` in a daemon thread until the block ends, then wait for the thread.

    When the block ends, the `threading.Event` is set, and `function` must return soon.

    Args:
        function: function that is called once, with a `threading.Event` as argument.
        name: name of the thread in stack traces.
    """
    ended = threading.Event()
    thread = threading.Thread(target=function, args=(ended,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()

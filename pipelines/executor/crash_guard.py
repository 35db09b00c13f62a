"""Call of a function in a child process, so that a crash or hang of the image decoder affects only one row.

The forked child inherits the items, and sends the result of each item as soon as the result is computed. If the child
dies, the first item without a result has killed the child, and a new child continues after this item. Captioning always
decodes pictures in a child process. Ingest and sharding decode far more pictures per second, and use a child process
only after a Python worker of Spark has died.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
R = TypeVar("R")

CHUNK_ITEMS = 32
CHUNK_BYTES = 16 * 2**20
OUT_OF_MEMORY = 77
"""Exit code of a child process that ran out of memory."""
RESULT_SECONDS = 900.0
"""Longest time in seconds that a child may need for one result. After this time, the child is killed.

The limits of `time_limit` do not end a child that waits, for example for a lock that another thread held during the
fork.
"""


class Death(NamedTuple):
    """Description of how a child process died.

    Attributes:
        how: phrase that says how the process died, such as "was ended by SIGSEGV".
        timed_out: whether a time limit was exceeded (`pipelines.executor.time_limit` or RESULT_SECONDS).
    """

    how: str
    timed_out: bool = False

    def describe(self, seconds: float) -> tuple[str, str]:
        """Return the refusal reason and its detail for a picture whose decoder had a time limit of `seconds`."""
        if self.timed_out:
            return "decode_timeout", f"more than {seconds:g} seconds"
        return "decoder_crash", f"the process that decoded the picture {self.how}"


TOO_SLOW = Death("took too long", timed_out=True)


def split_into_chunks(items: Iterable[T], size_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Group items into lists of at most CHUNK_ITEMS items and CHUNK_BYTES bytes; a larger item gets its own list."""
    chunk: list[T] = []
    chunk_size = 0
    for item in items:
        size = size_of(item)
        if chunk and (len(chunk) == CHUNK_ITEMS or chunk_size + size > CHUNK_BYTES):
            yield chunk
            chunk, chunk_size = [], 0
        chunk.append(item)
        chunk_size += size
    if chunk:
        yield chunk


def run_guarded(items: Sequence[T], function: Callable[[T], R], on_death: Callable[[T, Death], R]) -> Iterator[R]:
    """Call a function with each item, and yield the results. The calls run in a child process.

    The results of `function` must be picklable. If an item killed the child process, the return value of `on_death`
    becomes the result of the item, and a new child process continues with the next item.

    Args:
        items: items for which the function is called, in the order of the results.
        function: function that the child process calls with each item.
        on_death: function that this process calls with an item and its `Death` if the item killed the child process.

    Raises:
        Exception: any exception that `function` raised, except MemoryError, which counts as a crash.
    """
    done = 0
    while done < len(items):
        child = _Child(items[done:], function)
        try:
            for result in child.results():
                yield result
                done += 1
        except BaseException:
            # The function raised an error, or the caller closed this generator, so the child has no more work.
            child.kill()
            raise
        death = child.wait()
        if done < len(items):
            yield on_death(items[done], death)
            done += 1


class _Child(Generic[T, R]):
    """A forked process that computes results one by one."""

    def __init__(self, items: Sequence[T], function: Callable[[T], R]) -> None:
        fork = multiprocessing.get_context("fork")  # a forked child already has the items, so no item is pickled
        self._count = len(items)
        self._hangs = False
        self._reader, writer = fork.Pipe(duplex=False)
        self._process = fork.Process(target=_child_main, args=(items, function, writer))
        self._process.start()
        writer.close()

    def results(self) -> Iterator[R]:
        """Yield results until the child process has sent the results of all items, has died, or hangs."""
        for _ in range(self._count):
            if not self._reader.poll(RESULT_SECONDS):
                self._hangs = True
                self._process.kill()
                return
            try:
                result, error = self._reader.recv()
            except (EOFError, OSError):  # the child died before it had sent the whole result
                return
            if error is not None:
                raise error
            yield result

    def kill(self) -> None:
        """End the child."""
        self._process.kill()
        self.wait()

    def wait(self) -> Death:
        """Wait until the child process has ended, and return how it died."""
        self._reader.close()
        self._process.join()
        code = self._process.exitcode or 0
        return TOO_SLOW if self._hangs or code == -signal.SIGVTALRM else Death(_describe_exit(code))


def _child_main(items: Sequence[T], function: Callable[[T], R], writer: Connection) -> None:
    with suppress(OSError):  # on Linux, the kernel kills this process first if memory runs out
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    with suppress(BrokenPipeError):
        for item in items:
            try:
                result = function(item)
            except MemoryError:
                os._exit(OUT_OF_MEMORY)
            except Exception as error:  # noqa: BLE001 raised by the parent
                writer.send((None, error))
                return
            writer.send((result, None))


def _describe_exit(code: int) -> str:
    if code == OUT_OF_MEMORY:
        return "ran out of memory"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

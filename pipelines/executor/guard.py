"""Work in a process of its own: a decoder that crashes takes one row with it, and not the task.

Slow, so it is the second way, taken where a Python worker has died of the first. Items go to a forked child, what it
makes of them comes back as Arrow; where the child dies, the items are halved until the one is found that kills it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

T = TypeVar("T")

PORTION_ITEMS = 32
PORTION_BYTES = 16 * 2**20
OUT_OF_MEMORY = 77
"""The exit code of a child that could not have the memory it asked for."""

Work = Callable[[Sequence[T]], Iterator[pa.RecordBatch]]


def portions(items: Iterable[T], size_of: Callable[[T], int]) -> Iterator[list[T]]:
    """The items in lists that are bounded in number and, but for single items, in bytes."""
    portion: list[T] = []
    held = 0
    for item in items:
        size = size_of(item)
        if portion and (len(portion) == PORTION_ITEMS or held + size > PORTION_BYTES):
            yield portion
            portion, held = [], 0
        portion.append(item)
        held += size
    if portion:
        yield portion


def guarded(items: Sequence[T], work: Work[T], crashed: Callable[[T, str], pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """What `work` makes of the items, and what `crashed` makes of those at which it dies.

    Args:
        items: at least one.
        work: run in a child, on all items or on some of them in order; gives batches of one schema.
        crashed: called here, with such an item and how the child ended.

    Raises:
        Exception: what `work` raised, but for MemoryError, of which the child dies.
    """
    outcome = _in_child(items, work)
    if isinstance(outcome, pa.Table):
        yield from outcome.to_batches()
    elif len(items) == 1:
        yield crashed(items[0], outcome)
    else:
        half = len(items) // 2
        yield from guarded(items[:half], work, crashed)
        yield from guarded(items[half:], work, crashed)


def _in_child(items: Sequence[T], work: Work[T]) -> pa.Table | str:
    """A child's batches, or how it died."""
    fork = multiprocessing.get_context("fork")  # the items need not travel: the child has them
    reader, writer = fork.Pipe(duplex=False)
    child = fork.Process(target=_work_in_child, args=(items, work, writer))
    child.start()
    writer.close()
    with reader:
        try:
            sent = reader.recv()
        except (EOFError, OSError):  # it died before, or while, it sent
            sent = None
    child.join()
    if isinstance(sent, Exception):
        raise sent
    if sent is not None:
        return pa.ipc.open_stream(sent).read_all()
    return _end_of(child.exitcode or 0)


def _work_in_child(items: Sequence[T], work: Work[T], writer: Connection) -> None:
    with suppress(OSError):  # Linux: where memory runs out, let this process be the first to go
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    try:
        table = pa.Table.from_batches(list(work(items)))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        writer.send(sink.getvalue().to_pybytes())
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except Exception as error:  # noqa: BLE001 raised by the parent
        writer.send(error)


def _end_of(code: int) -> str:
    if code == OUT_OF_MEMORY:
        return "ran out of memory"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

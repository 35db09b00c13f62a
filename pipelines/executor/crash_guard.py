"""Crash isolation: run a function in a child process, so that a crashing decoder costs one row and not the task.

A child process is slow, so a child process is used only after a Python worker of Spark has died. The forked child
inherits the items and returns Arrow batches. If the child dies, the items are bisected until the item that kills it is
found.
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

CHUNK_ITEMS = 32
CHUNK_BYTES = 16 * 2**20
OUT_OF_MEMORY = 77
"""Exit code of a child that ran out of memory."""

Function = Callable[[Sequence[T]], Iterator[pa.RecordBatch]]


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


def run_guarded(
    items: Sequence[T], function: Function[T], on_crash: Callable[[T, str], pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Run a function on items in a child process, and isolate the items at which the function crashes.

    Args:
        items: list of at least one item.
        function: function that the child runs on all items or on a slice of the items, and that yields batches.
        on_crash: function that this process calls with the item that killed the child and a description of how the
            child ended.

    Raises:
        Exception: any exception that `function` raised, except MemoryError, which counts as a crash.
    """
    outcome = _run_in_child(items, function)
    if isinstance(outcome, pa.Table):
        yield from outcome.to_batches()
    elif len(items) == 1:
        yield on_crash(items[0], outcome)
    else:
        half = len(items) // 2
        yield from run_guarded(items[:half], function, on_crash)
        yield from run_guarded(items[half:], function, on_crash)


def _run_in_child(items: Sequence[T], function: Function[T]) -> pa.Table | str:
    """Return the child's batches, or a description of how the child died."""
    fork = multiprocessing.get_context("fork")  # a forked child already has the items: nothing is pickled
    reader, writer = fork.Pipe(duplex=False)
    child = fork.Process(target=_child_main, args=(items, function, writer))
    child.start()
    writer.close()
    with reader:
        try:
            sent = reader.recv()
        except (EOFError, OSError):  # the child died before or while it sent the result
            sent = None
    child.join()
    if isinstance(sent, Exception):
        raise sent
    if sent is not None:
        return pa.ipc.open_stream(sent).read_all()
    return _describe_exit(child.exitcode or 0)


def _child_main(items: Sequence[T], function: Function[T], writer: Connection) -> None:
    with suppress(OSError):  # Linux: if memory runs out, the kernel kills this process first
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    try:
        table = pa.Table.from_batches(list(function(items)))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        writer.send(sink.getvalue().to_pybytes())
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except Exception as error:  # noqa: BLE001 raised by the parent
        writer.send(error)


def _describe_exit(code: int) -> str:
    if code == OUT_OF_MEMORY:
        return "ran out of memory"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

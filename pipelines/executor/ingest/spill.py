"""Pictures and payloads between decoding and their table: in Arrow files that executors write and read, past Spark.

What becomes of a row is only known once all rows are planned. Kept by Spark until then, a picture would be copied about
ten times inside the JVM, which takes longer than decoding it. So the wide columns wait in files, rows carry their
place, and they join the row on its way into a table. Plain functions on Arrow batches, run by executors.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.executor.ingest.decode import OUTCOME

WIDE = pa.schema([OUTCOME.field("image"), OUTCOME.field("payload")])
"""What waits."""
PLACE = pa.schema([("file", pa.string()), ("batch", pa.int32()), ("row", pa.int32())])
"""Where it waits: a file of the staging folder, a record batch of it, a row of that."""
NARROW = pa.schema([*(field for field in OUTCOME if field.name not in WIDE.names), *PLACE])
"""OUTCOME, with the place of its wide columns instead of these."""

Decode = Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]


def staged(batches: Iterator[pa.RecordBatch], decode: Decode, folder: str) -> Iterator[pa.RecordBatch]:
    """Decode rows; what is wide of them goes into a file, the rest comes out as NARROW.

    Args:
        batches: what `decode` takes.
        decode: makes OUTCOME of it.
        folder: existing, a plain path that every executor sees. A task that is tried again writes another file.
    """
    with ExitStack() as stack:
        path, writer = Path(folder) / f"{uuid.uuid4().hex}.arrow", None
        for number, outcomes in enumerate(decode(batches)):
            writer = writer or stack.enter_context(pa.ipc.new_file(str(path), WIDE))
            writer.write_batch(outcomes.select(WIDE.names))
            rows = outcomes.num_rows
            place = [np.full(rows, path.name), np.full(rows, number), np.arange(rows)]
            rest = [outcomes.column(name) for name in NARROW.names[: -len(PLACE)]]
            placed = [pa.array(values, field.type) for values, field in zip(place, PLACE, strict=True)]
            yield pa.RecordBatch.from_arrays([*rest, *placed], schema=NARROW)


def with_wide(batches: Iterator[pa.RecordBatch], folder: str, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Rows with wide columns of theirs: the columns that came but for those of PLACE, and then `names`.

    Args:
        batches: rows with PLACE as their last columns. In the order of PLACE each batch that waits is read once.
        folder: where `staged` wrote.
        names: some of WIDE.
    """
    waiting = lru_cache(maxsize=1)(_waiting)
    for rows in batches:
        for first, end in _runs(rows):
            piece = rows.slice(first, end - first)
            *rest, file, batch, row = piece.columns
            wide = waiting(Path(folder) / file[0].as_py(), batch[0].as_py())
            taken = [wide.column(name).take(row) for name in names]
            yield pa.RecordBatch.from_arrays([*rest, *taken], names=[*rows.schema.names[: -len(PLACE)], *names])


def _waiting(path: Path, number: int) -> pa.RecordBatch:
    with pa.OSFile(str(path)) as file:
        return pa.ipc.open_file(file).get_batch(number)


def _runs(rows: pa.RecordBatch) -> Iterator[tuple[int, int]]:
    """First row and end of each run of rows that wait in one batch."""
    file, batch = (rows.column(name).to_numpy(zero_copy_only=False) for name in PLACE.names[:2])
    changes = np.flatnonzero((file[1:] != file[:-1]) | (batch[1:] != batch[:-1])) + 1
    starts = [0, *changes.tolist()] if rows.num_rows else []
    yield from zip(starts, [*starts[1:], rows.num_rows], strict=True)

"""Spill files: pictures and payloads are written to Arrow files between decoding and the write to their table.

The driver decides about a row only after all rows are planned. If Spark kept the pictures until then, it would copy
each one about ten times inside the JVM, which takes longer than decoding it. So Python workers write the wide columns
to files, Spark moves narrow rows that carry a position in these files, and the wide columns are read back when a row
is written to its table. Plain functions on Arrow batches.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.executor.ingest.outcome import OUTCOME

WIDE = pa.schema([OUTCOME.field("image"), OUTCOME.field("payload")])
"""Columns that are spilled."""
POSITION = pa.schema([("file", pa.string()), ("batch", pa.int32()), ("row", pa.int32())])
"""Position of a row's wide columns: file in the spill folder, record batch in the file, row in the batch."""
NARROW = pa.schema([*(field for field in OUTCOME if field.name not in WIDE.names), *POSITION])
"""OUTCOME with POSITION instead of the wide columns."""

Decode = Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]


def decode_and_spill(batches: Iterator[pa.RecordBatch], decode: Decode, folder: str) -> Iterator[pa.RecordBatch]:
    """Decode rows, write their wide columns to a new file, and yield the rest as NARROW.

    Args:
        batches: the input of `decode`.
        decode: yields OUTCOME batches.
        folder: the spill folder: an existing plain path that every executor sees. A retried task writes another file.
    """
    with ExitStack() as stack:
        path, writer = Path(folder) / f"{uuid.uuid4().hex}.arrow", None
        for number, outcomes in enumerate(decode(batches)):
            writer = writer or stack.enter_context(pa.ipc.new_file(str(path), WIDE))
            writer.write_batch(outcomes.select(WIDE.names))
            rows = outcomes.num_rows
            values = [np.full(rows, path.name), np.full(rows, number), np.arange(rows)]
            position = [pa.array(column, field.type) for column, field in zip(values, POSITION, strict=True)]
            narrow = [outcomes.column(name) for name in NARROW.names[: -len(POSITION)]]
            yield pa.RecordBatch.from_arrays([*narrow, *position], schema=NARROW)


def restore_wide(batches: Iterator[pa.RecordBatch], folder: str, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Replace the POSITION columns of rows by the wide columns that are spilled there.

    Args:
        batches: rows whose last columns are POSITION. If they are sorted by POSITION, each spilled batch is read once.
        folder: the spill folder.
        names: the wide columns to read.
    """
    read = lru_cache(maxsize=1)(_read_batch)
    for rows in batches:
        for start, end in _runs(rows):
            run = rows.slice(start, end - start)
            *narrow, file, batch, row = run.columns
            wide = read(Path(folder) / file[0].as_py(), batch[0].as_py())
            restored = [wide.column(name).take(row) for name in names]
            yield pa.RecordBatch.from_arrays([*narrow, *restored], names=[*rows.schema.names[: -len(POSITION)], *names])


def _read_batch(path: Path, number: int) -> pa.RecordBatch:
    with pa.OSFile(str(path)) as file:
        return pa.ipc.open_file(file).get_batch(number)


def _runs(rows: pa.RecordBatch) -> Iterator[tuple[int, int]]:
    """Yield start and end of each run of rows whose wide columns are in the same spilled batch."""
    file, batch = (rows.column(name).to_numpy(zero_copy_only=False) for name in POSITION.names[:2])
    changes = np.flatnonzero((file[1:] != file[:-1]) | (batch[1:] != batch[:-1])) + 1
    starts = [0, *changes.tolist()] if rows.num_rows else []
    yield from zip(starts, [*starts[1:], rows.num_rows], strict=True)

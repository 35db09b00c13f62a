"""Spill files: Arrow files that store pictures and payloads between decoding and the write to a table.

The driver cannot decide whether a row is accepted until all rows are decoded. If Spark kept the pictures until all rows
are decoded, Spark would copy each picture about ten times inside the JVM. Copying a picture ten times takes longer than
decoding the picture. Therefore Python workers write the wide columns (picture and payload) to spill files. Spark moves
only narrow rows, which contain a position in the spill files. When a row is written to its table, the wide columns are
read from the spill files.
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
"""Columns that are written to spill files."""
POSITION = pa.schema([("file", pa.string()), ("batch", pa.int32()), ("row", pa.int32())])
"""Position of a row's wide columns: file in the spill folder, record batch in the file, and row in the batch."""
NARROW = pa.schema([*(field for field in OUTCOME if field.name not in WIDE.names), *POSITION])
"""Columns of OUTCOME, with the columns of POSITION instead of the wide columns."""

Decode = Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]


def decode_and_spill(batches: Iterator[pa.RecordBatch], decode: Decode, folder: str) -> Iterator[pa.RecordBatch]:
    """Decode rows, write their wide columns to a new file, and yield batches of the schema NARROW.

    Args:
        batches: Arrow batches of raw rows, which `decode` decodes.
        decode: function that yields OUTCOME batches.
        folder: spill folder, an existing folder that has the same path on every executor. A retried task writes a new
            file.
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
    """Replace the POSITION columns of rows by the wide columns, which are read from the spill files.

    If the rows are sorted by POSITION, each record batch of the spill files is read only once.

    Args:
        batches: batches of rows whose last columns are POSITION.
        folder: spill folder.
        names: names of the wide columns to read.
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
    """Yield start and end of each sequence of rows whose wide columns are in the same record batch of a spill file."""
    file, batch = (rows.column(name).to_numpy(zero_copy_only=False) for name in POSITION.names[:2])
    changes = np.flatnonzero((file[1:] != file[:-1]) | (batch[1:] != batch[:-1])) + 1
    starts = [0, *changes.tolist()] if rows.num_rows else []
    yield from zip(starts, [*starts[1:], rows.num_rows], strict=True)

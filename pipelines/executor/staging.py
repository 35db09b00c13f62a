"""Pictures between decoding and their table: in Arrow files that executors write and read, past Spark.

What becomes of a picture is only known once all rows are planned. Kept by Spark until then, its bytes would be copied
about ten times inside the JVM, which takes longer than decoding them. So they wait in files, rows carry the place of
their picture, and it joins the row on its way into the table. Plain functions on Arrow batches, run by executors.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.executor.decode import OUTCOME

PLACE = pa.schema([("file", pa.string()), ("batch", pa.int32()), ("row", pa.int32())])
"""Where a picture lies: a file of the staging folder, a record batch of it, a row of that. Null without a picture."""
NARROW = pa.schema([*(field for field in OUTCOME if field.name != "image"), *PLACE])
"""OUTCOME, with the place of the picture instead of the picture."""
PICTURES = pa.schema([OUTCOME.field("image")])

Decode = Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]


def staged(batches: Iterator[pa.RecordBatch], decode: Decode, folder: str) -> Iterator[pa.RecordBatch]:
    """Decode rows; their pictures go into a file, what else they have comes out as NARROW.

    Args:
        batches: what `decode` takes.
        decode: makes OUTCOME of it.
        folder: existing, a plain path that every executor sees. A task that is tried again writes another file.
    """
    with ExitStack() as stack:
        path, writer, number = Path(folder) / f"{uuid.uuid4().hex}.arrow", None, 0
        for outcomes in decode(batches):
            images = outcomes.column("image")
            there = images.is_valid().to_numpy(zero_copy_only=False)
            if there.any():
                writer = writer or stack.enter_context(pa.ipc.new_file(str(path), PICTURES))
                writer.write_batch(pa.record_batch([images.drop_null()], schema=PICTURES))
            places = [
                pa.array(np.full(len(there), path.name), pa.string(), mask=~there),
                pa.array(np.full(len(there), number), pa.int32(), mask=~there),
                pa.array(np.cumsum(there) - 1, pa.int32(), mask=~there),
            ]
            number += bool(there.any())
            rest = [outcomes.column(name) for name in NARROW.names[: -len(PLACE)]]
            yield pa.RecordBatch.from_arrays([*rest, *places], schema=NARROW)


def with_pictures(batches: Iterator[pa.RecordBatch], folder: str) -> Iterator[pa.RecordBatch]:
    """Rows with their pictures: the columns that came but for those of PLACE, and `image` as the last.

    Args:
        batches: rows with PLACE as their last columns, none of it null. In the order of PLACE each batch of pictures is
            read once.
        folder: where `staged` wrote.
    """
    pictures = lru_cache(maxsize=1)(_pictures)
    for rows in batches:
        for first, end in _runs(rows):
            piece = rows.slice(first, end - first)
            *rest, file, batch, row = piece.columns
            images = pictures(Path(folder) / file[0].as_py(), batch[0].as_py()).take(row)
            yield pa.RecordBatch.from_arrays([*rest, images], names=[*rows.schema.names[: -len(PLACE)], "image"])


def _pictures(path: Path, number: int) -> pa.Array:
    with pa.OSFile(str(path)) as file:
        return pa.ipc.open_file(file).get_batch(number).column(0)


def _runs(rows: pa.RecordBatch) -> Iterator[tuple[int, int]]:
    """First row and end of each run of rows whose pictures lie in one batch."""
    file, batch = (rows.column(name).to_numpy(zero_copy_only=False) for name in PLACE.names[:2])
    changes = np.flatnonzero((file[1:] != file[:-1]) | (batch[1:] != batch[:-1])) + 1
    starts = [0, *changes.tolist()] if rows.num_rows else []
    yield from zip(starts, [*starts[1:], rows.num_rows], strict=True)

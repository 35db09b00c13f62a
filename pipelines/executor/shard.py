"""Pictures to pixels, and pixels to shard files: plain functions on Arrow batches, run by executors.

Two steps with Spark's shuffle between them. Before it pictures get their place, and become pixels if those are smaller;
behind it `write_files` receives them in their final order, makes pixels of what is none, and streams each file to disk:
a task holds batches, never a file.
"""

from __future__ import annotations

import hashlib
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.errors import StageFailed
from pipelines.executor.guard import guarded, portions
from pipelines.formats.shards import ShardRequest, encode_pixels, shard_schema, write_shard_file
from pipelines.formats.tables import TEXT_TYPE
from vlm.errors import ImageError
from vlm.image import open_image, to_pixels

PLACED = pa.schema(
    [
        ("file", pa.int32()),
        ("place", pa.string()),
        ("image_id", pa.string()),
        ("image", pa.binary()),  # pixels as the shard stores them, or still a picture file
        ("texts", pa.list_(TEXT_TYPE)),
    ]
)
WRITTEN = pa.schema([("file", pa.string()), ("rows", pa.int64()), ("bytes", pa.int64()), ("sha256", pa.string())])


def place_of(image_id: str, seed: int) -> str:
    """Where a picture stands in the shuffled order: a hash, so the order is the same however Spark splits the work."""
    return hashlib.sha256(f"{seed}/{image_id}".encode()).hexdigest()


def pixels_of(
    batches: Iterator[pa.RecordBatch], request: ShardRequest, firsts: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """Decode and resize pictures; a batch of PLACED, with pixels, for each batch that came.

    Args:
        batches: columns image_id, image (the bytes of a picture file), texts.
        request: what the shards hold.
        firsts: the place of each file's first row, in order.

    Raises:
        StageFailed: a picture that ingest decoded does not decode now.
    """
    for batch in pictures_of(batches, request, firsts):
        pixels = pa.array(_pixels(batch, request), pa.binary())
        columns = [pixels if name == "image" else batch.column(name) for name in PLACED.names]
        yield pa.RecordBatch.from_arrays(columns, schema=PLACED)


def pictures_of(
    batches: Iterator[pa.RecordBatch], request: ShardRequest, firsts: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """As `pixels_of`, but the pictures stay as they are."""
    for batch in batches:
        ids = batch.column("image_id")
        places = [place_of(image_id, request.seed) for image_id in ids.to_pylist()]
        files = pa.array([bisect_right(firsts, place) - 1 for place in places], pa.int32())
        texts = batch.column("texts").cast(PLACED.field("texts").type)
        columns = [files, pa.array(places, pa.string()), ids, batch.column("image"), texts]
        yield pa.RecordBatch.from_arrays(columns, schema=PLACED)


def pixels_guarded(
    batches: Iterator[pa.RecordBatch], request: ShardRequest, firsts: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """As `pixels_of`, in processes of its own: to find the picture at which the decoder crashes.

    Raises:
        StageFailed: names that picture, or what `pixels_of` names.
    """
    rows = (batch.slice(n, 1) for batch in batches for n in range(batch.num_rows))
    work = partial(_pixels_of_rows, request=request, firsts=firsts)
    for portion in portions(rows, lambda row: int(row.nbytes)):
        yield from guarded(portion, work, _crashed)


def _pixels_of_rows(
    rows: Sequence[pa.RecordBatch], request: ShardRequest, firsts: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    return pixels_of(iter(rows), request, firsts)


def _crashed(row: pa.RecordBatch, how: str) -> pa.RecordBatch:
    image_id = row.column("image_id")[0].as_py()
    raise StageFailed(
        "a picture of samples crashes its decoder",
        where=image_id,
        got=f"the process that decoded it {how}",
        fix="upgrade Pillow, or delete the row of this image_id from samples",
    )


def _encoded(image_id: str, data: bytes, request: ShardRequest) -> bytes:
    enough = request.image.size if request.draft else None
    try:
        # Ingest has already applied the limits of pixels and side.
        image, _ = open_image(data, max_pixels=sys.maxsize, min_side=1, draft_side=enough)
    except ImageError as error:
        raise StageFailed("a picture of samples does not decode", where=image_id, got=str(error)) from error
    return encode_pixels(to_pixels(image, request.image), request.encoding)


def _pixels(batch: pa.RecordBatch, request: ShardRequest) -> list[bytes]:
    rows = zip(batch.column("image_id").to_pylist(), batch.column("image").to_pylist(), strict=True)
    return [_encoded(image_id, image, request) for image_id, image in rows]


def write_files(
    batches: Iterator[pa.RecordBatch], request: ShardRequest, folder: str, *, decoded: bool
) -> Iterator[pa.RecordBatch]:
    """Write the shard files whose rows come, sorted by file and place; one WRITTEN row a file.

    Args:
        batches: PLACED in order; all rows of a file come to one call.
        request: what the shards hold.
        folder: the shard folder, existing, a plain path that every executor sees.
        decoded: whether pixels came, and not pictures.

    Raises:
        StageFailed: a picture that ingest decoded does not decode now.
    """
    for number, pieces in groupby(_pieces(batches), key=lambda piece: piece[0]):
        rows = (_as_stored(piece, request, decoded=decoded) for _, piece in pieces)
        written = write_shard_file(Path(folder), number, request, rows)
        yield pa.RecordBatch.from_pylist([written.model_dump()], WRITTEN)


def _pieces(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches cut where the file number changes."""
    for batch in batches:
        files = batch.column("file").to_numpy()
        starts = [0, *(np.flatnonzero(np.diff(files)) + 1).tolist()] if len(files) else []
        for start, end in zip(starts, [*starts[1:], len(files)], strict=True):
            yield int(files[start]), batch.slice(start, end - start)


def _as_stored(piece: pa.RecordBatch, request: ShardRequest, *, decoded: bool) -> pa.RecordBatch:
    schema = shard_schema(request)
    stored = schema.field("pixels").type
    image = piece.column("image")
    pixels = image.cast(stored) if decoded else pa.array(_pixels(piece, request), stored)
    texts = piece.column("texts").cast(schema.field("texts").type)
    return pa.RecordBatch.from_arrays([piece.column("image_id"), pixels, texts], schema=schema)

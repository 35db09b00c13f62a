"""Pictures to pixels, and pixels to shard files: plain functions on Arrow batches, run by executors.

Two steps with Spark's shuffle between them. `pixels_of` makes pictures small before they travel; `write_files` receives
them in their final order and streams each file to disk, so a task holds batches, never a file.
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
from pipelines.shards import ShardRequest, encode_pixels, shard_schema, write_shard_file
from pipelines.tables import TEXT_TYPE
from vlm.errors import ImageError
from vlm.image import open_image, to_pixels

PIXELS = pa.schema(
    [
        ("file", pa.int32()),
        ("place", pa.string()),
        ("image_id", pa.string()),
        ("pixels", pa.binary()),
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
    """Decode and resize pictures; a batch of PIXELS for each batch that came.

    Args:
        batches: columns image_id, image (the bytes of a picture file), texts.
        request: what the shards hold.
        firsts: the place of each file's first row, in order.

    Raises:
        StageFailed: a picture that ingest decoded does not decode now.
    """
    for batch in batches:
        ids = batch.column("image_id").to_pylist()
        places = [place_of(image_id, request.seed) for image_id in ids]
        images = batch.column("image").to_pylist()
        pixels = [_encoded(image_id, image, request) for image_id, image in zip(ids, images, strict=True)]
        files = [bisect_right(firsts, place) - 1 for place in places]
        yield pa.RecordBatch.from_pydict(
            {
                "file": files,
                "place": places,
                "image_id": ids,
                "pixels": pixels,
                "texts": batch.column("texts").to_pylist(),
            },
            PIXELS,
        )


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
        image, _ = open_image(data, max_pixels=sys.maxsize, min_side=1, enough=enough)  # the limits are ingest's to set
    except ImageError as error:
        raise StageFailed("a picture of samples does not decode", where=image_id, got=str(error)) from error
    return encode_pixels(to_pixels(image, request.image), request.encoding)


def write_files(batches: Iterator[pa.RecordBatch], request: ShardRequest, folder: str) -> Iterator[pa.RecordBatch]:
    """Write the shard files whose rows come, sorted by file and place; one WRITTEN row a file.

    Args:
        batches: PIXELS in order; all rows of a file come to one call.
        request: what the shards hold.
        folder: the shard folder, existing, a plain path that every executor sees.
    """
    schema = shard_schema(request)
    for number, pieces in groupby(_pieces(batches), key=lambda piece: piece[0]):
        rows = (_as_stored(piece, schema) for _, piece in pieces)
        written = write_shard_file(Path(folder), number, request, rows)
        yield pa.RecordBatch.from_pylist([written.model_dump()], WRITTEN)


def _pieces(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches cut where the file number changes."""
    for batch in batches:
        files = batch.column("file").to_numpy()
        starts = [0, *(np.flatnonzero(np.diff(files)) + 1).tolist()] if len(files) else []
        for start, end in zip(starts, [*starts[1:], len(files)], strict=True):
            yield int(files[start]), batch.slice(start, end - start)


def _as_stored(piece: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({name: piece.column(name).to_pylist() for name in schema.names}, schema)

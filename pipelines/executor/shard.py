"""Functions that decode the pictures of `samples` to pixels and write the pixels to shard files in shuffled order.

Sharding has two steps with Spark's shuffle between them. Before the shuffle, each picture gets its shuffle key and its
file number. Pictures are decoded before or after the shuffle, whichever is faster (see `_decode_after_shuffle` in
`driver/shard/write.py`). After the shuffle, `write_files` receives the rows in their final order, decodes pictures that
are not decoded yet, and streams each file to disk. A Spark task has a few batches in memory, but never a whole shard
file.
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
from pipelines.executor.crash_guard import Death, run_guarded, split_into_chunks
from pipelines.executor.time_limit import TimeLimitExceeded, time_limit
from pipelines.formats.shards import ShardRequest, encode_pixels, shard_schema, write_shard_file
from pipelines.formats.tables import TEXT_TYPE
from vlm.errors import ImageError
from vlm.image import load_decoders, open_image, to_pixels

SHUFFLED = pa.schema(
    [
        ("file", pa.int32()),
        ("shuffle_key", pa.string()),
        ("image_id", pa.string()),
        ("image", pa.binary()),  # pixels, encoded as in a shard file, or a picture file that is not decoded yet
        ("texts", pa.list_(TEXT_TYPE)),
    ]
)
"""Schema of the rows that pass through Spark's shuffle."""
WRITTEN = pa.schema([("file", pa.string()), ("rows", pa.int64()), ("bytes", pa.int64()), ("sha256", pa.string())])


def shuffle_key(image_id: str, seed: int) -> str:
    """Return the sort key of a picture, which is a hash of its id and the seed.

    The order of the shuffled pictures depends only on their keys, and not on Spark's partitions.
    """
    return hashlib.sha256(f"{seed}/{image_id}".encode()).hexdigest()


def assign_files(
    batches: Iterator[pa.RecordBatch], request: ShardRequest, first_keys: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """Add shuffle keys and file numbers to rows, without decoding pictures. Yield batches of the schema SHUFFLED.

    Args:
        batches: batches with the columns image_id, image (the bytes of a picture file) and texts.
        request: shard request, which determines the content of the shards.
        first_keys: shuffle key of the first row of each file, in ascending order.
    """
    for batch in batches:
        ids = batch.column("image_id")
        keys = [shuffle_key(image_id, request.seed) for image_id in ids.to_pylist()]
        files = pa.array([bisect_right(first_keys, key) - 1 for key in keys], pa.int32())
        texts = batch.column("texts").cast(SHUFFLED.field("texts").type)
        columns = [files, pa.array(keys, pa.string()), ids, batch.column("image"), texts]
        yield pa.RecordBatch.from_arrays(columns, schema=SHUFFLED)


def assign_files_and_decode(
    batches: Iterator[pa.RecordBatch], request: ShardRequest, first_keys: Sequence[str], seconds: float
) -> Iterator[pa.RecordBatch]:
    """Add shuffle keys and file numbers to rows, and decode their pictures to pixels.

    The arguments are the same as in `assign_files`. `seconds` is the longest time to decode a picture, in seconds.

    Raises:
        StageFailed: a picture that ingest could decode cannot be decoded now.
    """
    for batch in assign_files(batches, request, first_keys):
        pixels = pa.array(_decode_batch(batch, request, seconds), pa.binary())
        columns = [pixels if name == "image" else batch.column(name) for name in SHUFFLED.names]
        yield pa.RecordBatch.from_arrays(columns, schema=SHUFFLED)


def assign_files_and_decode_guarded(
    batches: Iterator[pa.RecordBatch], request: ShardRequest, first_keys: Sequence[str], seconds: float
) -> Iterator[pa.RecordBatch]:
    """Do the same as `assign_files_and_decode`, but in child processes, to find the picture that crashes the decoder.

    Raises:
        StageFailed: a picture crashes the decoder or cannot be decoded. The error names the picture.
    """
    rows = (batch.slice(n, 1) for batch in batches for n in range(batch.num_rows))
    load_decoders()
    decode = partial(_decode_row, request=request, first_keys=first_keys, seconds=seconds)
    for chunk in split_into_chunks(rows, lambda row: int(row.nbytes)):
        yield from run_guarded(chunk, decode, _fail_on_death)


def _decode_row(
    row: pa.RecordBatch, request: ShardRequest, first_keys: Sequence[str], seconds: float
) -> pa.RecordBatch:
    return next(assign_files_and_decode(iter([row]), request, first_keys, seconds))


def _fail_on_death(row: pa.RecordBatch, death: Death) -> pa.RecordBatch:
    image_id = row.column("image_id")[0].as_py()
    raise StageFailed(
        "a picture in table samples crashes the process that decodes the picture",
        where=image_id,
        got=f"the decoding process {death.how}",
        fix="upgrade Pillow, or delete the row of this image_id from samples",
    )


def _decode_picture(image_id: str, data: bytes, request: ShardRequest, seconds: float) -> bytes:
    assert request.image is not None
    enough = request.image.size if request.draft else None
    try:
        # The number of pixels is not checked, because ingest has refused pictures with too many pixels or a side that
        # is too short.
        with time_limit(seconds):
            image, _ = open_image(data, max_pixels=sys.maxsize, min_side=1, draft_side=enough)
    except ImageError as error:
        raise StageFailed("a picture in table samples cannot be decoded", where=image_id, got=str(error)) from error
    except TimeLimitExceeded:
        raise StageFailed(
            "a picture in table samples takes too long to decode",
            where=image_id,
            got=f"decoding takes more than {seconds:g} seconds",
            fix="raise data.limits.max_decode_seconds, or delete the row of this image_id from samples",
        ) from None
    return encode_pixels(to_pixels(image, request.image), request.encoding)


def _decode_batch(batch: pa.RecordBatch, request: ShardRequest, seconds: float) -> list[bytes]:
    rows = zip(batch.column("image_id").to_pylist(), batch.column("image").to_pylist(), strict=True)
    return [_decode_picture(image_id, image, request, seconds) for image_id, image in rows]


def write_files(
    batches: Iterator[pa.RecordBatch], request: ShardRequest, folder: str, *, decoded: bool, seconds: float
) -> Iterator[pa.RecordBatch]:
    """Write shard files, and yield a row of the schema WRITTEN for each file.

    All rows of a shard file must be in the batches of the same call.

    Args:
        batches: batches of the schema SHUFFLED, sorted by file and shuffle key.
        request: shard request, which determines the content of the shards.
        folder: shard folder, an existing folder that has the same path on every executor.
        decoded: whether the column `image` already contains pixels.
        seconds: longest time to decode a picture, in seconds.

    Raises:
        StageFailed: a picture that ingest could decode cannot be decoded now.
    """
    for number, pieces in groupby(split_by_file(batches), key=lambda piece: piece[0]):
        rows = (_to_shard_rows(piece, request, decoded=decoded, seconds=seconds) for _, piece in pieces)
        written = write_shard_file(Path(folder), number, request, rows)
        yield pa.RecordBatch.from_pylist([written.model_dump()], WRITTEN)


def split_by_file(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Split batches where the file number changes. Yield pairs of a file number and the rows of this file."""
    for batch in batches:
        files = batch.column("file").to_numpy()
        starts = [0, *(np.flatnonzero(np.diff(files)) + 1).tolist()] if len(files) else []
        for start, end in zip(starts, [*starts[1:], len(files)], strict=True):
            yield int(files[start]), batch.slice(start, end - start)


def _to_shard_rows(piece: pa.RecordBatch, request: ShardRequest, *, decoded: bool, seconds: float) -> pa.RecordBatch:
    """Convert rows of the schema SHUFFLED to the schema of a shard file."""
    schema = shard_schema(request)
    pixel_type = schema.field("pixels").type
    image = piece.column("image")
    pixels = image.cast(pixel_type) if decoded else pa.array(_decode_batch(piece, request, seconds), pixel_type)
    texts = piece.column("texts").cast(schema.field("texts").type)
    return pa.RecordBatch.from_arrays([piece.column("image_id"), pixels, texts], schema=schema)

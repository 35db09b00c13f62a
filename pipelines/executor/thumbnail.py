"""Rows with small pictures for people to look at: plain functions on Arrow batches, run by executors."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pyarrow as pa

from pipelines.config import LimitsConfig
from pipelines.executor.ingest.records import json_object
from vlm.errors import ImageError
from vlm.image import decode_base64, open_image

SIDE = 200
"""Pixels on the longer side."""
SHOWN_CHARS = 400
LIMITS = LimitsConfig()


def with_thumbnails(batches: Iterator[pa.RecordBatch], column: str) -> Iterator[pa.RecordBatch]:
    """Rows with a last column `thumbnail`, a JPEG or null, in place of one that holds pictures.

    Args:
        batches: any columns.
        column: the one with pictures (binary), or with payloads of quarantine (strings). Of a payload its beginning
            stays, as a column of the same name before the thumbnail.
    """
    for batch in batches:
        at = batch.schema.get_field_index(column)
        kept = [n for n in range(batch.num_columns) if n != at]
        columns, names = [batch.column(n) for n in kept], [batch.schema.names[n] for n in kept]
        values = batch.column(at).to_pylist()
        shown = _shown(batch)
        if pa.types.is_string(batch.schema.field(at).type):
            columns.append(pa.array([value[:SHOWN_CHARS] for value in values], pa.string()))
            names.append(column)
            values = [picture_in(value) for value in values]
        small = [thumbnail(value) if show else None for value, show in zip(values, shown, strict=True)]
        columns.append(pa.array(small, pa.binary()))
        yield pa.RecordBatch.from_arrays(columns, names=[*names, "thumbnail"])


def _shown(batch: pa.RecordBatch) -> list[bool]:
    """Which rows' pictures may be decoded: of quarantine not those that end the process that does."""
    if "reason" not in batch.schema.names:
        return [True] * batch.num_rows
    return [reason != "decoder_crash" for reason in batch.column("reason").to_pylist()]


def picture_in(payload: str) -> bytes | None:
    """The picture in a refused row, whatever its column is called: the longest string that is base64."""
    fields = json_object(payload)
    strings = [value for value in fields.values() if isinstance(value, str)] if isinstance(fields, dict) else []
    try:
        return decode_base64(max(strings, key=len, default=""), LIMITS.max_bytes)
    except ImageError:
        return None


def thumbnail(data: bytes | None) -> bytes | None:
    """A small JPEG of a picture, or None where it cannot be shown."""
    if not data:
        return None
    try:
        image, _ = open_image(data, max_pixels=LIMITS.max_pixels, min_side=1)
    except ImageError:
        return None
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()

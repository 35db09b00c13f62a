"""Functions that make thumbnails in a child process, for pictures that may crash the decoder, such as pictures in
`quarantine`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import pyarrow as pa

from pipelines.config import LimitsConfig
from pipelines.executor.crash_guard import run_guarded
from pipelines.executor.ingest.records.record import parse_json_object
from pipelines.executor.time_limit import TimeLimitExceeded, time_limit
from pipelines.pages.thumbnail import MAX_PIXELS, make_thumbnail
from vlm.errors import ImageError
from vlm.image import decode_base64, load_decoders

SHOWN_CHARS = 400
"""Number of characters to which a payload is truncated."""
MAX_BYTES, MAX_SECONDS = LimitsConfig().max_bytes, LimitsConfig().max_decode_seconds


def with_thumbnails(
    batches: Iterator[pa.RecordBatch], column: str, max_pixels: int = MAX_PIXELS
) -> Iterator[pa.RecordBatch]:
    """Drop a column of pictures and append a column `thumbnail`: a JPEG file, or null if the picture is unusable.

    If `column` contains payloads, the payloads are truncated to SHOWN_CHARS characters, and stay in a column of the
    same name before `thumbnail`. The thumbnail of a picture with more than `max_pixels` pixels is null.

    Args:
        batches: Arrow batches with the column `column` and any other columns, which are kept.
        column: name of a column of pictures (binary) or of quarantine payloads (string).
        max_pixels: largest width times height of a picture.
    """
    for batch in batches:
        index = batch.schema.get_field_index(column)
        kept = [n for n in range(batch.num_columns) if n != index]
        columns, names = [batch.column(n) for n in kept], [batch.schema.names[n] for n in kept]
        values = batch.column(index).to_pylist()
        safe = _safe_to_decode(batch)
        if pa.types.is_string(batch.schema.field(index).type):
            columns.append(pa.array([value[:SHOWN_CHARS] for value in values], pa.string()))
            names.append(column)
            values = [find_picture(value) for value in values]
        shown = [value if is_safe else None for value, is_safe in zip(values, safe, strict=True)]
        columns.append(pa.array(make_thumbnails(shown, max_pixels), pa.binary()))
        yield pa.RecordBatch.from_arrays(columns, names=[*names, "thumbnail"])


def make_thumbnails(pictures: Sequence[bytes | None], max_pixels: int = MAX_PIXELS) -> list[bytes | None]:
    """Make thumbnails in a child process.

    The result for a picture is None if the picture is None, has more than `max_pixels` pixels, cannot be decoded in
    time, or crashes the decoder.
    """
    load_decoders()
    return list(run_guarded(pictures, partial(_make_thumbnail, max_pixels=max_pixels), lambda *_: None))


def _make_thumbnail(data: bytes | None, max_pixels: int) -> bytes | None:
    try:
        with time_limit(MAX_SECONDS):
            return make_thumbnail(data, max_pixels=max_pixels)
    except TimeLimitExceeded:
        return None


def _safe_to_decode(batch: pa.RecordBatch) -> list[bool]:
    """Return for each row whether to decode its picture: False if the row was refused for a decoder crash or a timeout.

    A picture that has crashed the decoder or exceeded the time limit would crash or block the decoder again.
    """
    if "reason" not in batch.schema.names:
        return [True] * batch.num_rows
    return [reason not in {"decoder_crash", "decode_timeout"} for reason in batch.column("reason").to_pylist()]


def find_picture(payload: str) -> bytes | None:
    """Decode the longest string in a refused row's JSON payload as base64.

    Return None if the string is not base64, or if it decodes to more than MAX_BYTES bytes.
    """
    fields = parse_json_object(payload)
    strings = [value for value in fields.values() if isinstance(value, str)] if isinstance(fields, dict) else []
    try:
        return decode_base64(max(strings, key=len, default=""), MAX_BYTES)
    except ImageError:
        return None

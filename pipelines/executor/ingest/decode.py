"""Functions that turn each raw row into exactly one sample, or into one refusal with a reason from a closed list.

A bad row never raises an exception. Even an unexpected error becomes a refusal, which describes the error in `detail`.
If the machine runs out of memory or the image decoder crashes, the task fails, and Spark retries the task. If all
retries fail, the driver starts a Spark job that decodes the rows again in child processes (`decode_guarded`).

The identifier of a row contains the name of the row's file and a hash of the row's content, but not the row's position.
A row therefore keeps its identifier when the files are read again, and when Spark splits the files in another way.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
from PIL import Image

from pipelines.config import ColumnNames, LimitsConfig, SplitConfig
from pipelines.executor.crash_guard import TOO_SLOW, Death, run_guarded, split_into_chunks
from pipelines.executor.ingest.fingerprint import fingerprint
from pipelines.executor.ingest.outcome import Refused, outcome_batch
from pipelines.executor.ingest.records.record import Fields, Read, Record
from pipelines.executor.ingest.splits import assign_split, require_field
from pipelines.executor.ingest.texts import extract_texts
from pipelines.executor.ingest.values import bytes_to_id, normalize_id, replace_surrogates, to_text
from pipelines.executor.time_limit import TimeLimitExceeded, time_limit
from vlm.errors import ImageError
from vlm.image import ImageInfo, decode_base64, load_decoders, open_image

BASE64_AS_BYTES = re.compile(rb"\s*(data:image/|[A-Za-z0-9+/_-]{60})")
"""Pattern of base64 text in a value of type bytes. No picture file begins with bytes that match this pattern."""
BASE64_HEAD = 160
"""Number of characters that are decoded to recognise data that was encoded as base64 twice. The number is a multiple of
4."""
MAX_PREFIX = 2**10
"""Largest number of characters of a data-URL prefix."""
FLUSH_BYTES = 16 * 2**20
FLUSH_ROWS = 256


@dataclass(frozen=True)
class DecodeRules:
    """Settings that decide whether a row becomes a sample, and what the sample contains.

    Attributes:
        source: name of the data config, which is the prefix of image ids.
        columns: names of the source's columns for the picture, the text, the id and the prompt.
        limits: limits on the size of a picture, the number and the length of its texts, and the decoding time.
        split: config of the rule that assigns a row to a split.
        near_duplicates: whether to compute the fingerprints that find near duplicates.
    """

    source: str
    columns: ColumnNames
    limits: LimitsConfig
    split: SplitConfig
    near_duplicates: bool = True


def decode_batches(batches: Iterator[pa.RecordBatch], read: Read, rules: DecodeRules) -> Iterator[pa.RecordBatch]:
    """Decode rows into OUTCOME batches of bounded size, one outcome per record.

    Args:
        batches: Arrow batches of raw rows, which `read` parses.
        read: function that parses raw rows of the source into records.
        rules: settings that decide whether a record becomes a sample.
    """
    yield from _batch_outcomes(decode_record(record, rules) for record in read(batches))


def decode_guarded(batches: Iterator[pa.RecordBatch], read: Read, rules: DecodeRules) -> Iterator[pa.RecordBatch]:
    """Decode rows like `decode_batches`, but in child processes. Refuse each row that crashes or blocks its process."""
    load_decoders()
    chunks = split_into_chunks(read(batches), _record_bytes)
    decode, refuse = partial(decode_record, rules=rules), partial(_refuse_deadly, rules=rules)
    yield from _batch_outcomes(outcome for records in chunks for outcome in run_guarded(records, decode, refuse))


def _record_bytes(record: Record) -> int:
    return sum(len(value) for value in record.fields.values() if isinstance(value, (str, bytes)))


def _refuse_deadly(record: Record, death: Death, rules: DecodeRules) -> dict[str, Any]:
    return _refusal(record, Refused("decode", *death.describe(rules.limits.max_decode_seconds)), rules)


def _batch_outcomes(decoded: Iterable[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
    outcomes: list[dict[str, Any]] = []
    size = 0
    for outcome in decoded:
        outcomes.append(outcome)
        size += len(outcome.get("image") or b"") + len(outcome["payload"])
        if size >= FLUSH_BYTES or len(outcomes) >= FLUSH_ROWS:
            yield outcome_batch(outcomes)
            outcomes, size = [], 0
    if outcomes:
        yield outcome_batch(outcomes)


def decode_record(record: Record, rules: DecodeRules) -> dict[str, Any]:
    """Decode one record and return the columns of OUTCOME that are not null."""
    record = record._replace(fields=_decode_bytes(record.fields, rules))
    try:
        sample = _decode_or_refuse(record, rules)
    except Refused as refused:
        return _refusal(record, refused, rules)
    # A decoded row may still be refused when the row is merged into the table, and a refused row needs its payload.
    may_be_refused = rules.columns.id is not None or rules.limits.max_texts is not None
    others = record.others() if record.others and may_be_refused else {}
    payload = _to_json(others | {name: value for name, value in record.fields.items() if name != rules.columns.image})
    # The identifier is computed from the picture's SHA-256 instead of the picture's base64, because hashing the base64
    # text would take a tenth of the decoding time.
    name = record.source_row or _source_row(record.file, payload + sample["sha256"])
    return {"source_row": name, "payload": payload, **sample}


def _decode_bytes(fields: Fields, rules: DecodeRules) -> Fields:
    """Convert values of type bytes in the text, prompt, id and split columns to strings.

    The payload stores bytes as base64. Without the conversion to strings, a replay of the row would use the base64 form
    instead of the text itself.
    """
    columns, split = rules.columns, rules.split
    named = (columns.text, columns.prompt, split.column if split.kind == "column" else None)
    found: Fields = {}
    for name in {name for name in named if name is not None and name != columns.image}:
        value = fields.get(name)
        if isinstance(value, bytes):
            found[name] = to_text(value, name)
        elif isinstance(value, list) and any(isinstance(one, bytes) for one in value):
            found[name] = [to_text(one, name) if isinstance(one, bytes) else one for one in value]
    if columns.id and isinstance(given := fields.get(columns.id), bytes):
        found[columns.id] = bytes_to_id(given)
    return fields | found if found else fields


def _refusal(record: Record, refused: Refused, rules: DecodeRules) -> dict[str, Any]:
    others = record.others() if record.others else {}
    payload = record.raw if record.raw is not None else _to_json(others | record.fields)
    why = {"stage": refused.stage, "reason": refused.reason, "detail": refused.detail}
    name = record.source_row or _source_row(record.file, payload)
    return {"source_row": name, "payload": payload, "claimed_id": _claimed_id(record, rules), **why}


def _claimed_id(record: Record, rules: DecodeRules) -> str | None:
    """Return the image id that a refused row would have as a sample.

    The id comes from the id column or, without an id column, from the bytes of the picture. Return None if this value
    is missing or invalid.
    """
    columns, fields = rules.columns, record.fields
    try:
        if columns.id:
            return f"{rules.source}/{normalize_id(require_field(fields, columns.id))}"
        image = _image_bytes(require_field(fields, columns.image), columns.image, rules.limits.max_bytes)
    except Exception:  # noqa: BLE001 (the row is refused, for this reason or for an earlier one)
        return None
    return f"{rules.source}/{_sha256(image)[:24]}"


def _source_row(file: str, content: str) -> str:
    return f"{file}#{_sha256(content.encode())[:16]}"


def _decode_or_refuse(record: Record, rules: DecodeRules) -> dict[str, Any]:
    """Decode a record into the columns of a sample.

    Raises:
        Refused: the row cannot become a sample.
        MemoryError: the machine is out of memory. The row is not refused, and Spark retries the task.
    """
    if record.problem:
        raise Refused("read", *record.problem)
    try:
        return _decode_sample(record.file, record.fields, rules)
    except (Refused, MemoryError):
        raise
    except Exception as error:  # quarantine stores the cause, so that users can inspect and replay the row
        raise Refused("decode", "malformed_record", f"unexpected {type(error).__name__}: {error}") from error


def _decode_sample(file: str, fields: Fields, rules: DecodeRules) -> dict[str, Any]:
    columns, limits = rules.columns, rules.limits
    encoded = require_field(fields, columns.image)
    given_id = normalize_id(require_field(fields, columns.id)) if columns.id else None
    texts = extract_texts(fields, columns, limits.max_text_chars)
    distinct = len({(text["prompt"], text["text"]) for text in texts})
    if limits.max_texts is not None and distinct > limits.max_texts:
        raise Refused("decode", "too_many_texts", f"{distinct} texts; at most {limits.max_texts} are allowed")
    image = _image_bytes(encoded, columns.image, limits.max_bytes)
    info, sha256, found = _decode_picture(_SameBytes(image), limits, near_duplicates=rules.near_duplicates)
    return {
        "image_id": f"{rules.source}/{given_id or sha256[:24]}",
        "sha256": sha256,
        "image": image,
        "format": info.format,
        "width": info.width,
        "height": info.height,
        "texts": texts,
        "split": assign_split(file, fields, sha256, rules.split),
        "fingerprint": found,
    }


class _SameBytes:
    """Cache key of a bytes object.

    Two keys are equal only if they contain the same object; the bytes themselves are not compared.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SameBytes) and self.data is other.data

    def __hash__(self) -> int:
        return id(self.data)


@lru_cache(maxsize=1)
def _decode_picture(
    image: _SameBytes, limits: LimitsConfig, *, near_duplicates: bool
) -> tuple[ImageInfo, str, bytes | None]:
    """Return the format and size of a picture, its SHA-256 and its fingerprint.

    Consecutive rows may contain the same picture with different captions. The result of the last call is cached, so a
    picture that consecutive rows share is decoded only once.
    """
    pixels, info = _open_image(image.data, limits)
    return info, _sha256(image.data), fingerprint(pixels) if near_duplicates else None


def _image_bytes(value: object, column: str, max_bytes: int) -> bytes:
    """Return the bytes of a picture file, given a value that contains bytes or base64.

    The payload of a refused row stores bytes as base64. If the bytes were themselves base64 text, the value has been
    encoded twice, and this function decodes the value twice.

    Raises:
        Refused: with reason bad_base64 or too_large, or malformed_record if the value is neither bytes nor a string.
    """
    if isinstance(value, bytes) and BASE64_AS_BYTES.match(value):
        value = value.decode("ascii", "replace")
    if isinstance(value, str):
        try:
            return _decode_text(value, max_bytes)
        except ImageError as error:
            raise Refused("decode", error.reason, error.detail) from None
    if not isinstance(value, bytes):
        kind = type(value).__name__
        raise Refused("decode", "malformed_record", f"column {column} holds a {kind}, neither bytes nor base64")
    if len(value) > max_bytes:
        raise Refused("decode", "too_large", f"{len(value)} bytes; at most {max_bytes} are allowed")
    return value


def _decode_text(value: str, max_bytes: int) -> bytes:
    """Decode a value that was encoded as base64 once or twice.

    Raises:
        ImageError: the value is not base64, or the result has more than `max_bytes` bytes.
    """
    try:
        begin = base64.b64decode(value[:BASE64_HEAD], validate=True)
    except ValueError:  # base64 in another form, such as a data URL; a payload never contains base64 in such a form
        begin = b""
    if BASE64_AS_BYTES.match(begin):
        value = decode_base64(value, 2 * max_bytes + MAX_PREFIX).decode("ascii", "replace")
    return decode_base64(value, max_bytes)


def _open_image(data: bytes, limits: LimitsConfig) -> tuple[Image.Image, ImageInfo]:
    try:
        with time_limit(limits.max_decode_seconds):
            return open_image(data, max_pixels=limits.max_pixels, min_side=limits.min_side)
    except ImageError as error:
        raise Refused("decode", error.reason, error.detail) from None
    except TimeLimitExceeded:
        raise Refused("decode", *TOO_SLOW.describe(limits.max_decode_seconds)) from None


def _to_json(fields: Fields) -> str:
    try:
        text = json.dumps(fields, ensure_ascii=False, sort_keys=True, default=_to_json_string)
    except RecursionError:
        flat = {name: "nested too deeply" if isinstance(v, list | dict) else v for name, v in fields.items()}
        text = json.dumps(flat, ensure_ascii=False, sort_keys=True, default=_to_json_string)
    return replace_surrogates(text)


def _to_json_string(value: Any) -> str:
    """Convert a value that JSON cannot represent: bytes become base64, and times and decimals become strings."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

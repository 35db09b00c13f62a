"""Rows as they came, in; samples or refusals, out: plain functions on Arrow batches, run by executors.

Every row comes out exactly once, as one of two kinds in one schema (OUTCOME): a sample (`reason` null) or a refusal
with one of the closed list of reasons. Nothing about a row raises; what nobody foresaw is a refusal too, with the
exception in `detail`. Trouble of the machine itself (out of memory), or a decoder that crashes, fails the task, which
Spark then retries; where it fails for good, the driver has the rows decoded once more, guarded.

A row's identity comes from its content, never from its place: Spark may split files as it likes, and a second reading
of the same row gives the same ids.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from types import NoneType
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.config import ColumnNames, ColumnSplitConfig, HashSplitConfig, LimitsConfig, Split, SplitConfig
from pipelines.executor.guard import guarded, portions
from pipelines.executor.ingest.fingerprint import fingerprint
from pipelines.executor.ingest.records import Fields, Read, Record
from pipelines.executor.time_limit import TimeUp, time_limit
from pipelines.formats.tables import TEXT_TYPE
from vlm.errors import ImageError
from vlm.image import ImageInfo, decode_base64, open_image

OUTCOME = pa.schema(
    [
        ("source_row", pa.string()),  # <file>#<hash of all the row had>
        ("payload", pa.string()),  # all the row had, JSON; a sample's is without its picture, which is in `image`
        ("image_id", pa.string()),  # from here to fingerprint: null where the row is refused
        ("sha256", pa.string()),
        ("image", pa.binary()),
        ("format", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("texts", pa.list_(TEXT_TYPE)),
        ("split", pa.string()),
        ("fingerprint", pa.binary()),
        ("stage", pa.string()),  # from here on: null where the row is a sample
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)

FLUSH_BYTES = 16 * 2**20
FLUSH_ROWS = 256
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters, but for tab and line feed."""
SPLITS: dict[str, Split] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
"""What sources call their splits."""
PART = re.compile(r"-\d+(-of-\d+)?$")


@dataclass(frozen=True)
class Rules:
    """What makes a row a sample: the source's name and columns, the limits, how splits are given, and fingerprints."""

    source: str
    columns: ColumnNames
    limits: LimitsConfig
    split: SplitConfig
    near_duplicates: bool = True


class Refused(Exception):
    """A row that goes to quarantine: stage, reason (one of tables.REASONS) and detail."""

    def __init__(self, stage: str, reason: str, detail: str) -> None:
        super().__init__(stage, reason, detail)
        self.stage, self.reason, self.detail = stage, reason, detail


def decode_batches(batches: Iterator[pa.RecordBatch], read: Read, rules: Rules) -> Iterator[pa.RecordBatch]:
    """Decode rows into OUTCOME batches of bounded size, one outcome a record.

    Args:
        batches: rows as the source's reader gives them.
        read: makes records of them.
        rules: what makes a record a sample.
    """
    yield from _decoded(read(batches), rules)


def decode_guarded(batches: Iterator[pa.RecordBatch], read: Read, rules: Rules) -> Iterator[pa.RecordBatch]:
    """As `decode_batches`, in processes of their own: a row at which the decoder crashes is refused."""
    for records in portions(read(batches), _size_of):
        yield from guarded(records, partial(_decoded, rules=rules), _crashed)


def _size_of(record: Record) -> int:
    return sum(len(value) for value in record.fields.values() if isinstance(value, (str, bytes)))


def _crashed(record: Record, how: str) -> pa.RecordBatch:
    refused = Refused("decode", "decoder_crash", f"the process that decoded it {how}")
    return batch_of([_refusal(record, refused)])


def _decoded(records: Iterable[Record], rules: Rules) -> Iterator[pa.RecordBatch]:
    outcomes: list[dict[str, Any]] = []
    held = 0
    for record in records:
        outcomes.append(decode_row(record, rules))
        held += len(outcomes[-1].get("image") or b"") + len(outcomes[-1]["payload"])
        if held >= FLUSH_BYTES or len(outcomes) >= FLUSH_ROWS:
            yield batch_of(outcomes)
            outcomes, held = [], 0
    if outcomes:
        yield batch_of(outcomes)


def batch_of(outcomes: Sequence[dict[str, Any]]) -> pa.RecordBatch:
    """Outcomes as OUTCOME. Pictures are copied once: Arrow's own builder copies them again and again as it grows."""
    columns = {field: [outcome.get(field.name) for outcome in outcomes] for field in OUTCOME}
    arrays = [_joined(c) if field.name == "image" else pa.array(c, field.type) for field, c in columns.items()]
    return pa.RecordBatch.from_arrays(arrays, schema=OUTCOME)


def _joined(values: Sequence[bytes | None]) -> pa.Array:
    parts = [value or b"" for value in values]
    ends = np.cumsum([0, *map(len, parts)], dtype=np.int32)
    there = pa.array([value is not None for value in values]).buffers()[1]
    return pa.Array.from_buffers(pa.binary(), len(parts), [there, pa.py_buffer(ends), pa.py_buffer(b"".join(parts))])


def decode_row(record: Record, rules: Rules) -> dict[str, Any]:
    """One row's outcome, as the columns of OUTCOME that it has."""
    try:
        sample = _judge(record, rules)
    except Refused as refused:
        return _refusal(record, refused)
    payload = _as_json({name: value for name, value in record.fields.items() if name != rules.columns.image})
    # The picture's own hash stands for it: to hash megabytes of base64 too takes a tenth as long as decoding it.
    name = record.source_row or _name_of_row(record.file, payload + sample["sha256"])
    return {"source_row": name, "payload": payload, **sample}


def _refusal(record: Record, refused: Refused) -> dict[str, Any]:
    payload = record.raw if record.raw is not None else _as_json(record.fields)
    why = {"stage": refused.stage, "reason": refused.reason, "detail": refused.detail}
    return {"source_row": record.source_row or _name_of_row(record.file, payload), "payload": payload, **why}


def _name_of_row(file: str, content: str) -> str:
    return f"{file}#{_sha256(content.encode())[:16]}"


def _judge(record: Record, rules: Rules) -> dict[str, Any]:
    """The sample a row makes, or Refused, whatever is wrong with it."""
    if record.trouble:
        raise Refused("read", *record.trouble)
    try:
        return _sample(record.file, record.fields, rules)
    except (Refused, MemoryError):  # out of memory is the machine's trouble: a retried task may well succeed
        raise
    except Exception as error:  # unforeseen: kept with its cause, so that it can be seen, counted and replayed
        raise Refused("decode", "malformed_record", f"unforeseen {type(error).__name__}: {error}") from error


def _sample(file: str, fields: Fields, rules: Rules) -> dict[str, Any]:
    columns, limits = rules.columns, rules.limits
    encoded = _required(fields, columns.image)
    given_id = str(_required(fields, columns.id)).strip() if columns.id else None
    texts = texts_of(fields, columns, limits.max_text_chars)
    image = bytes_of(encoded, columns.image, limits.max_bytes)
    pixels, info = _opened(image, limits)
    sha256 = _sha256(image)
    return {
        "image_id": f"{rules.source}/{given_id or sha256[:24]}",
        "sha256": sha256,
        "image": image,
        "format": info.format,
        "width": info.width,
        "height": info.height,
        "texts": texts,
        "split": _split(file, fields, sha256, rules.split),
        "fingerprint": fingerprint(pixels) if rules.near_duplicates else None,
    }


def _required(fields: Fields, column: str) -> Any:
    value = fields.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Refused("decode", "missing_field", f"column {column} is empty")
    return value


# ------------------------------------------------------------------------------------------------ texts


def texts_of(fields: Fields, columns: ColumnNames, max_chars: int) -> list[dict[str, str]]:
    """The texts of a row, each with its prompt, without repetition: one text, or a list of them.

    Prompts come as a list too, one a text, or as one for all. Empty texts of a list are left out.

    Raises:
        Refused: empty_text (not one that is not), text_too_long, malformed_record (neither texts nor numbers, or not as
            many prompts as texts).
    """
    texts = _strings(fields.get(columns.text), columns.text)
    prompts = _strings(fields.get(columns.prompt), columns.prompt) if columns.prompt else [""]
    if len(prompts) == 1:
        prompts *= len(texts)
    if len(prompts) != len(texts):
        raise Refused("decode", "malformed_record", f"{len(prompts)} prompts for {len(texts)} texts")
    clean = [
        (clean_text(prompt, max_chars), clean_text(text, max_chars))
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    kept = dict.fromkeys(pair for pair in clean if pair[1])
    if not kept:
        raise Refused("decode", "empty_text", f"column {columns.text} has nothing but white space")
    return [{"prompt": prompt, "text": text} for prompt, text in kept]


def _strings(value: Any, column: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    strange = [type(one).__name__ for one in values if not isinstance(one, (str, int, float, NoneType))]
    if strange:
        raise Refused("decode", "malformed_record", f"column {column} holds a {strange[0]}, neither text nor number")
    return ["" if one is None else str(one) for one in values]


def clean_text(text: str, max_chars: int) -> str:
    """Unicode NFC, one kind of line break, no other control characters: texts that look the same are the same.

    Raises:
        Refused: text_too_long.
    """
    if CONTROL.search(text):
        text = CONTROL.sub(" ", text.replace("\r\n", "\n").replace("\r", "\n"))
    clean = unicodedata.normalize("NFC", text).strip()
    if len(clean) > max_chars:
        raise Refused("decode", "text_too_long", f"{len(clean)} characters, at most {max_chars}")
    return clean


# ------------------------------------------------------------------------------------------------ pictures


def bytes_of(value: Any, column: str, max_bytes: int) -> bytes:
    """The bytes of a picture that came as bytes or as base64.

    Raises:
        Refused: bad_base64, too_large, or malformed_record for anything else.
    """
    if isinstance(value, str):
        try:
            return decode_base64(value, max_bytes)
        except ImageError as error:
            raise Refused("decode", error.reason, error.detail) from None
    if not isinstance(value, bytes):
        kind = type(value).__name__
        raise Refused("decode", "malformed_record", f"column {column} holds a {kind}, neither bytes nor base64")
    if len(value) > max_bytes:
        raise Refused("decode", "too_large", f"{len(value)} bytes, at most {max_bytes}")
    return value


def _opened(data: bytes, limits: LimitsConfig) -> tuple[Image.Image, ImageInfo]:
    try:
        with time_limit(limits.max_decode_seconds):
            return open_image(data, max_pixels=limits.max_pixels, min_side=limits.min_side)
    except ImageError as error:
        raise Refused("decode", error.reason, error.detail) from None
    except TimeUp:
        raise Refused("decode", "decode_timeout", f"more than {limits.max_decode_seconds:g} seconds") from None


def split_of(sha256: str, config: HashSplitConfig) -> Split:
    """The split of a picture: a function of its content alone, so equal pictures are never on two sides."""
    place = int(sha256[:13], 16) / 16**13
    if place < config.test:
        return "test"
    return "val" if place < config.test + config.val else "train"


def split_of_file(file: str) -> Split | None:
    """The split a file stands for: its name without any suffix, and without the number of a part."""
    return SPLITS.get(PART.sub("", PurePosixPath(file).name.partition(".")[0]))


def _split(file: str, fields: Fields, sha256: str, config: SplitConfig) -> Split:
    if isinstance(config, HashSplitConfig):
        return split_of(sha256, config)
    given = str(_required(fields, config.column)).strip().lower() if isinstance(config, ColumnSplitConfig) else ""
    split = SPLITS.get(given) if given else split_of_file(file)
    if split is None:
        raise Refused("decode", "malformed_record", f"the split {given or file!r} is none of {', '.join(SPLITS)}")
    return split


def _as_json(fields: Fields) -> str:
    return json.dumps(fields, ensure_ascii=False, sort_keys=True, default=_plain)


def _plain(value: Any) -> str:
    """What JSON has no word for: bytes as base64, times and decimals as they are written."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

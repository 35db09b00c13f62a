"""Decoding of texts: each raw row becomes exactly one text or one refusal with a reason from a closed list."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.config import SplitConfig
from pipelines.executor.ingest.outcome import Refused
from pipelines.executor.ingest.records.record import Read, Record
from pipelines.executor.ingest.splits import assign_split
from pipelines.executor.ingest.texts import normalize_text
from pipelines.executor.ingest.values import replace_surrogates
from pipelines.executor.texts.records import TEXT

OUTCOME = pa.schema(
    [
        ("source_row", pa.string()),  # <file>#<hash of the row's content>
        ("payload", pa.string()),  # the refused row as JSON or raw text; null if the row is a text
        ("text_id", pa.string()),  # the columns from text_id to split are null if the row is refused
        ("sha256", pa.string()),
        ("text", pa.string()),
        ("split", pa.string()),
        ("stage", pa.string()),  # stage, reason and detail are null if the row is a text
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
FLUSH_CHARS = 16 * 2**20
FLUSH_ROWS = 1024


@dataclass(frozen=True)
class TextRules:
    """Settings that decide whether a row becomes a text, and to which split the text belongs.

    Attributes:
        source: name of the data config, which is the prefix of text ids.
        max_chars: largest length of a text, in characters.
        split: rule that assigns a row to a split.
    """

    source: str
    max_chars: int
    split: SplitConfig


def decode_texts(batches: Iterator[pa.RecordBatch], read: Read, rules: TextRules) -> Iterator[pa.RecordBatch]:
    """Decode rows into OUTCOME batches of bounded size, one outcome per record.

    Args:
        batches: batches of raw rows, the input of `read`.
        read: function that parses raw rows of the source into records.
        rules: settings that decide whether a record becomes a text.
    """
    outcomes: list[dict[str, Any]] = []
    chars = 0
    for record in read(batches):
        outcomes.append(decode_text(record, rules))
        chars += len(outcomes[-1].get("text") or outcomes[-1]["payload"])
        if chars >= FLUSH_CHARS or len(outcomes) >= FLUSH_ROWS:
            yield pa.RecordBatch.from_pylist(outcomes, OUTCOME)
            outcomes, chars = [], 0
    if outcomes:
        yield pa.RecordBatch.from_pylist(outcomes, OUTCOME)


def decode_text(record: Record, rules: TextRules) -> dict[str, Any]:
    """Decode one record and return the columns of OUTCOME that are not null."""
    content = record.raw if record.raw is not None else _to_json(record)
    name = record.source_row or f"{record.file}#{_sha256(content)[:16]}"
    try:
        return {"source_row": name, **_accept(record, rules)}
    except Refused as refused:
        why = {"stage": refused.stage, "reason": refused.reason, "detail": refused.detail}
        return {"source_row": name, "payload": content, **why}


def _accept(record: Record, rules: TextRules) -> dict[str, Any]:
    """Return the values of OUTCOME's columns for a record that becomes a text.

    Raises:
        Refused: the row cannot become a text.
    """
    if record.problem:
        raise Refused("read", *record.problem)
    text = record.fields.get(TEXT)
    if not isinstance(text, str):
        raise Refused("decode", "malformed_record", f"field {TEXT} holds a {type(text).__name__}, not a text")
    text = normalize_text(text, rules.max_chars)
    if not text:
        raise Refused("decode", "empty_text", "the row has no visible character")
    sha256 = _sha256(text)
    split = assign_split(record.file, record.fields, sha256, rules.split)
    return {"text_id": f"{rules.source}/{sha256[:24]}", "sha256": sha256, "text": text, "split": split}


def _to_json(record: Record) -> str:
    return replace_surrogates(json.dumps(record.fields, ensure_ascii=False, sort_keys=True))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

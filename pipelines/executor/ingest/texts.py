"""Validation and normalisation of the texts of a row."""

from __future__ import annotations

import re
import unicodedata
from types import NoneType
from typing import Any

from pipelines.config import ColumnNames
from pipelines.executor.ingest.outcome import Refused
from pipelines.executor.ingest.records.record import Fields

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Pattern of the control characters other than tab and line feed."""


def extract_texts(fields: Fields, columns: ColumnNames, max_chars: int) -> list[dict[str, str]]:
    """Return the distinct texts of a row, each with its prompt.

    The text column holds one text or a list of texts. The prompt column holds one prompt for all texts or a list with
    one prompt per text. Empty texts are dropped.

    Raises:
        Refused: empty_text (all texts are empty), text_too_long, or malformed_record (a value is neither text nor
            number, or the number of prompts differs from the number of texts).
    """
    texts = _to_strings(fields.get(columns.text), columns.text)
    prompts = _to_strings(fields.get(columns.prompt), columns.prompt) if columns.prompt else [""]
    if len(prompts) == 1:
        prompts *= len(texts)
    if len(prompts) != len(texts):
        raise Refused("decode", "malformed_record", f"{len(prompts)} prompts for {len(texts)} texts")
    normalized = [
        (normalize_text(prompt, max_chars), normalize_text(text, max_chars))
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    distinct = dict.fromkeys(pair for pair in normalized if pair[1])
    if not distinct:
        raise Refused("decode", "empty_text", f"column {columns.text} has only white space")
    return [{"prompt": prompt, "text": text} for prompt, text in distinct]


def _to_strings(value: Any, column: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    invalid = [type(one).__name__ for one in values if not isinstance(one, (str, int, float, NoneType))]
    if invalid:
        raise Refused("decode", "malformed_record", f"column {column} holds a {invalid[0]}, neither text nor number")
    return ["" if one is None else str(one) for one in values]


def normalize_text(text: str, max_chars: int) -> str:
    """Normalise a text so that texts that look the same are equal.

    The result is in Unicode NFC, contains no control characters except line feeds and tabs, and has no white space at
    either end.

    Raises:
        Refused: text_too_long.
    """
    if CONTROL.search(text):
        text = CONTROL.sub(" ", text.replace("\r\n", "\n").replace("\r", "\n"))
    normalized = unicodedata.normalize("NFC", text).strip()
    if len(normalized) > max_chars:
        raise Refused("decode", "text_too_long", f"{len(normalized)} characters, at most {max_chars}")
    return normalized

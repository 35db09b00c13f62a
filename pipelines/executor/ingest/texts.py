"""Validation and normalisation of the texts of a row."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from pipelines.config import ColumnNames
from pipelines.executor.ingest.outcome import Refused
from pipelines.executor.ingest.records.record import Fields
from pipelines.executor.ingest.values import MAX_SHRINKAGE, is_missing, to_text, trim

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Pattern of all control characters except tab and line feed."""


def extract_texts(fields: Fields, columns: ColumnNames, max_chars: int) -> list[dict[str, str]]:
    """Return the texts of a row with their prompts. The texts have the order of the row, and repeated texts are kept.

    The text column contains one text or a list of texts. The prompt column contains one prompt for all texts, or a list
    with one prompt per text. Missing texts are left out.

    Raises:
        Refused: with the reason empty_text (all texts are missing), text_too_long, or malformed_record (`to_text`
            refuses a value, or the number of prompts differs from the number of texts).
    """
    texts = _to_texts(fields.get(columns.text), columns.text)
    asked = fields.get(columns.prompt) if columns.prompt else None
    prompts = [""] if is_missing(asked) else _to_texts(asked, str(columns.prompt))
    if len(prompts) == 1:
        prompts *= len(texts)
    if len(prompts) != len(texts):
        raise Refused("decode", "malformed_record", f"{len(prompts)} prompts for {len(texts)} texts")
    normalized = [
        (normalize_text(prompt, max_chars), normalize_text(text, max_chars))
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    found = [pair for pair in normalized if pair[1]]
    if not found:
        raise Refused("decode", "empty_text", f"column {columns.text} has no visible character")
    return [{"prompt": prompt, "text": text} for prompt, text in found]


def _to_texts(value: Any, column: str) -> list[str]:
    return [to_text(one, f"column {column}") for one in (value if isinstance(value, list) else [value])]


def normalize_text(text: str, max_chars: int) -> str:
    """Normalise a text so that texts that look the same are equal.

    The result is in Unicode NFC, contains no control characters except line feeds and tabs, and has no white space at
    either end. A text without a visible character becomes empty.

    Raises:
        Refused: with the reason text_too_long.
    """
    if CONTROL.search(text):
        text = CONTROL.sub(" ", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = trim(text)
    if len(text) <= MAX_SHRINKAGE * max_chars:  # a longer text is not normalised, because NFC may take quadratic time
        text = trim(unicodedata.normalize("NFC", text))
    if is_missing(text):
        return ""
    if len(text) > max_chars:
        raise Refused("decode", "text_too_long", f"{len(text)} characters, at most {max_chars}")
    return text

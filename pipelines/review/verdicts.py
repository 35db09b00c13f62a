"""Verdicts of people on captions, in the table `verdicts`. A later verdict on a caption replaces the earlier verdict.

Tables are read and written as files, without Spark, so that the server answers within milliseconds.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pyarrow as pa
from deltalake import DeltaTable
from pydantic import Field, model_validator

from pipelines.errors import UserError
from pipelines.formats.delta_files import open_or_create, query_rows, quoted_text
from pipelines.formats.tables import MODEL_DIGEST, PICTURE_COLUMNS, VERDICTS
from pipelines.review.source_pictures import PictureColumns, SourcePictures
from vlm.config import Config

KEY = ("image_id", "model_version", "settings_hash", MODEL_DIGEST.name)
"""Columns that identify a caption of one source table and one model."""
CAPTION_COLUMNS = ("caption", "error", "prompt", "mean_logprob", "captioned_at", *KEY)
Show = Literal["open", "judged", "all"]
Key = tuple[str, str, str, str]


class CaptionVerdict(Config):
    """Verdict of a reviewer on one caption.

    Attributes:
        model_digest: digest of the model, or empty if Lakesight 0.1.0 wrote the caption.
        text: corrected caption, or empty if `verdict` is not `corrected`.
    """

    image_id: Annotated[str, Field(min_length=1)]
    model_version: Annotated[str, Field(min_length=1)]
    settings_hash: Annotated[str, Field(min_length=1)]
    model_digest: str = ""
    verdict: Literal["good", "bad", "corrected"]
    text: Annotated[str, Field(max_length=10_000)] = ""

    @model_validator(mode="after")
    def _text_only_if_corrected(self) -> Self:
        if (self.verdict == "corrected") != bool(self.text.strip()):
            raise ValueError("give a text with verdict corrected, and no text with verdict good or bad")
        return self

    @property
    def key(self) -> Key:
        """Values that identify the caption among all captions of its table and model."""
        return self.image_id, self.model_version, self.settings_hash, self.model_digest


class Review:
    """Captions of one model for the pictures of one table, with the verdicts of reviewers.

    The captions are sorted by ascending likelihood, because unlikely captions need a review most.

    Attributes:
        captions: rows of `generated_captions` that have a caption.
        judged: verdicts so far: a dict from the key of a caption to the verdict on the caption.
    """

    def __init__(self, captions: DeltaTable, pictures: DeltaTable, verdicts: Path, *, table: str, model: str) -> None:
        of_model = f"source_table = {quoted_text(table)} AND model_name = {quoted_text(model)}"
        columns = (*CAPTION_COLUMNS, *(column.name for column in PICTURE_COLUMNS))
        self.captions = _read(captions, columns, f"{of_model} AND caption IS NOT NULL", "ORDER BY mean_logprob")
        self._by_key = {key_of(row): row for row in self.captions}
        newest: dict[str, Any] = max(self.captions, key=lambda row: row["captioned_at"], default={})
        self._pictures = SourcePictures(pictures, PictureColumns.of_caption(newest))
        self._table, self._model = table, model
        self._verdicts = open_or_create(verdicts, VERDICTS)
        self._lock = threading.Lock()
        judged = _read(self._verdicts, ("verdict", "text", *KEY), of_model)
        self.judged = {key_of(row): row["verdict"] for row in judged}

    def find(self, show: Show, words: str) -> list[dict[str, Any]]:
        """Return the captions that contain `words`, and that `show` selects.

        `show` is `open` for captions without a verdict, `judged` for captions with a verdict, or `all`.
        """
        judged = {"open": (False,), "judged": (True,), "all": (False, True)}[show]
        text = words.lower()
        return [
            row for row in self.captions if (key_of(row) in self.judged) in judged and text in row["caption"].lower()
        ]

    def picture(self, image_id: str) -> bytes | None:
        """Return the bytes of a caption's picture file, or None if the table no longer contains the picture."""
        return self._pictures.read([image_id]).get(image_id)

    def save_verdict(self, verdict: CaptionVerdict, reviewer: str) -> None:
        """Write a verdict to the table. The new verdict replaces an earlier verdict on the same caption.

        Raises:
            UserError: the caption or its picture does not exist.
        """
        caption = self._by_key.get(verdict.key)
        image = self.picture(verdict.image_id)
        if caption is None or image is None:
            raise UserError(
                "the caption does not exist", where=self._table, got=verdict.image_id, fix="reload the page"
            )
        text = {"good": caption["caption"], "bad": None, "corrected": verdict.text.strip()}[verdict.verdict]
        row = verdict.model_dump() | {
            "source_table": self._table,
            "model_name": self._model,
            "model_digest": verdict.model_digest or None,
            "caption": caption["caption"],
            "prompt": caption["prompt"],
            "text": text,
            "image": image,
            "sha256": hashlib.sha256(image).hexdigest(),
            "reviewer": reviewer,
            "judged_at": datetime.now(UTC),
        }
        same_caption = " AND ".join(f"(old.{column} IS NOT DISTINCT FROM new.{column})" for column in VERDICTS.key)
        with self._lock:
            self._verdicts.update_incremental()
            merge = self._verdicts.merge(
                pa.Table.from_pylist([row], VERDICTS.arrow_schema), same_caption, source_alias="new", target_alias="old"
            )
            merge.when_matched_update_all().when_not_matched_insert_all().execute()
            self.judged[verdict.key] = verdict.verdict


def key_of(row: dict[str, Any]) -> Key:
    """Return the key of a caption. The digest is empty if Lakesight 0.1.0 wrote the caption."""
    return row["image_id"], row["model_version"], row["settings_hash"], row[MODEL_DIGEST.name] or ""


def _read(table: DeltaTable, columns: Sequence[str], where: str, order: str = "") -> list[dict[str, Any]]:
    """Read columns of the selected rows of a table. A table of Lakesight 0.1.0 lacks the column `model_digest`."""
    existing = {field.name for field in table.schema().fields}
    found = query_rows(table, ", ".join(name for name in columns if name in existing), where, order)
    return [{MODEL_DIGEST.name: None} | row for row in found]

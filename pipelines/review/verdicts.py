"""What people say of captions: table `verdicts`, one row a caption, the last word counts.

Tables are read and written as files, without Spark: a reviewer waits for a click, not for a JVM.
"""

from __future__ import annotations

import hashlib
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from pydantic import Field, model_validator

from pipelines.errors import UserError
from pipelines.formats.tables import VERDICTS, arrow_dataset
from vlm.config import Config

KEY = ("image_id", "model_version", "settings_hash")
"""What names a caption, within one table and model."""
SHOWN = ("caption", "error", "prompt", "mean_logprob", *KEY)
Show = Literal["open", "judged", "all"]
Key = tuple[str, str, str]


class CaptionVerdict(Config):
    """One click. `text` is what the caption should have been, where it was corrected."""

    image_id: Annotated[str, Field(min_length=1)]
    model_version: Annotated[str, Field(min_length=1)]
    settings_hash: Annotated[str, Field(min_length=1)]
    verdict: Literal["good", "bad", "corrected"]
    text: Annotated[str, Field(max_length=10_000)] = ""

    @model_validator(mode="after")
    def _text_where_corrected(self) -> Self:
        if (self.verdict == "corrected") != bool(self.text.strip()):
            raise ValueError("text belongs to corrected, and only there")
        return self

    @property
    def key(self) -> Key:
        """Of the caption."""
        return self.image_id, self.model_version, self.settings_hash


class Review:
    """The captions of one model and table, their pictures, and what has been said of them.

    Attributes:
        captions: rows of `generated_captions` with a caption, the least likely first: there is the most to say of them.
        judged: the verdict on each that has one.
    """

    def __init__(self, captions: DeltaTable, pictures: DeltaTable, verdicts: Path, *, table: str, model: str) -> None:
        ours = (pc.field("source_table") == table) & (pc.field("model_name") == model) & pc.field("caption").is_valid()
        found = arrow_dataset(captions).to_table(list(SHOWN), filter=ours)
        self.captions: list[dict[str, Any]] = found.sort_by("mean_logprob").to_pylist()
        self._by_key = {key_of(row): row for row in self.captions}
        self._pictures, self._table, self._model = pictures, table, model
        self._verdicts = open_verdicts(verdicts)
        self._lock = threading.Lock()
        said = arrow_dataset(self._verdicts).to_table(
            ["verdict", "text", *KEY], filter=(pc.field("source_table") == table) & (pc.field("model_name") == model)
        )
        self.judged = {key_of(row): row["verdict"] for row in said.to_pylist()}

    def shown(self, show: Show, words: str) -> list[dict[str, Any]]:
        """Captions that have a verdict, have none, or either, and hold some words."""
        wanted = {"open": (False,), "judged": (True,), "all": (False, True)}[show]
        held = words.lower()
        return [
            row for row in self.captions if (key_of(row) in self.judged) in wanted and held in row["caption"].lower()
        ]

    def picture(self, image_id: str) -> bytes | None:
        """The bytes of a picture; None where the table has no such row any more."""
        rows = arrow_dataset(self._pictures).to_table(["image"], filter=pc.field("image_id") == image_id)
        return bytes(rows["image"][0].as_py()) if rows.num_rows else None

    def save_verdict(self, verdict: CaptionVerdict, reviewer: str) -> None:
        """Write a verdict down; one on the same caption is replaced.

        Raises:
            UserError: there is no such caption here.
        """
        caption = self._by_key.get(verdict.key)
        image = self.picture(verdict.image_id)
        if caption is None or image is None:
            raise UserError("there is no such caption to judge", where=self._table, got=verdict.image_id, fix="reload")
        text = {"good": caption["caption"], "bad": None, "corrected": verdict.text.strip()}[verdict.verdict]
        row = verdict.model_dump() | {
            "source_table": self._table,
            "model_name": self._model,
            "caption": caption["caption"],
            "prompt": caption["prompt"],
            "text": text,
            "image": image,
            "sha256": hashlib.sha256(image).hexdigest(),
            "reviewer": reviewer,
            "judged_at": datetime.now(UTC),
        }
        same = " AND ".join(f"there.{column} = said.{column}" for column in VERDICTS.key)
        with self._lock:
            merge = self._verdicts.merge(
                pa.Table.from_pylist([row], VERDICTS.arrow_schema), same, source_alias="said", target_alias="there"
            )
            merge.when_matched_update_all().when_not_matched_insert_all().execute()
            self.judged[verdict.key] = verdict.verdict


def key_of(row: dict[str, Any]) -> Key:
    """What names a caption."""
    return row["image_id"], row["model_version"], row["settings_hash"]


def open_verdicts(folder: Path) -> DeltaTable:
    """The table, made where there is none."""
    return DeltaTable.create(
        folder,
        VERDICTS.arrow_schema,
        mode="ignore",
        name=VERDICTS.name,
        description=VERDICTS.comment,
        configuration=VERDICTS.properties,
    )

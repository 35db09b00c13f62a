"""Captions, pictures and verdicts in local Delta tables, which are read and written as files, without Spark.

The server therefore answers within milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable

from pipelines.formats.delta_files import open_or_create, query_rows, quoted_text
from pipelines.formats.tables import MODEL_DIGEST, VERDICTS
from pipelines.review.source_pictures import SourcePictures
from pipelines.review.verdicts import CAPTION_COLUMNS, KEY, Texts, key_of


class DeltaStore:
    """Captions of one model for the pictures of one table, with verdicts, in Delta tables on a disk.

    Args:
        captions: table `generated_captions`.
        pictures: captioned table.
        verdicts: folder of the table `verdicts`, which is created if it does not exist.
        table: full name of the captioned table.
        model: full name of the model.
        has_texts: whether the captioned table is table `samples`, which has human texts.
    """

    def __init__(
        self,
        captions: DeltaTable,
        pictures: DeltaTable,
        verdicts: Path,
        *,
        table: str,
        model: str,
        has_texts: bool,
    ) -> None:
        self._captions = captions
        self._pictures = SourcePictures(pictures)
        self._has_texts = has_texts
        self._verdicts = open_or_create(verdicts, VERDICTS)
        self._of_model = f"source_table = {quoted_text(table)} AND model_name = {quoted_text(model)}"

    def read_captions(self) -> list[dict[str, Any]]:
        """Read the newest versions of the tables. See `CaptionStore.read_captions`."""
        self._captions.update_incremental()
        self._verdicts.update_incremental()
        rows = _read(self._captions, CAPTION_COLUMNS, f"{self._of_model} AND caption IS NOT NULL")
        judged = _read(self._verdicts, ("verdict", *KEY), self._of_model)
        verdicts = {key_of(row): row["verdict"] for row in judged}
        return [row | {"verdict": verdicts.get(key_of(row))} for row in rows]

    def read_picture(self, caption: Mapping[str, Any]) -> bytes | None:
        """Read a picture file. See `CaptionStore.read_picture`."""
        return self._pictures.read([caption]).get((caption["image_id"], caption["sha256"]))

    def read_texts(self, captions: Sequence[Mapping[str, Any]]) -> Texts:
        """Read human texts. See `CaptionStore.read_texts`."""
        return self._pictures.read_texts([row["image_id"] for row in captions]) if self._has_texts else {}

    def write_verdict(self, row: Mapping[str, Any], caption: Mapping[str, Any]) -> bool:
        """Write a row of table `verdicts` with the picture. See `CaptionStore.write_verdict`."""
        image = self.read_picture(caption)
        if image is None:
            return False
        written = {**row, "image": image}
        same_caption = " AND ".join(f"(old.{column} IS NOT DISTINCT FROM new.{column})" for column in VERDICTS.key)
        self._verdicts.update_incremental()
        merge = self._verdicts.merge(
            pa.Table.from_pylist([written], VERDICTS.arrow_schema),
            same_caption,
            source_alias="new",
            target_alias="old",
        )
        merge.when_matched_update_all().when_not_matched_insert_all().execute()
        return True


def _read(table: DeltaTable, columns: Sequence[str], where: str) -> list[dict[str, Any]]:
    """Read columns of the selected rows of a table. A table of Lakesight 0.1.0 lacks the column `model_digest`."""
    existing = {field.name for field in table.schema().fields}
    found = query_rows(table, ", ".join(name for name in columns if name in existing), where)
    return [{MODEL_DIGEST.name: None} | row for row in found]

"""Captions, pictures and verdicts in local Delta tables, which are read and written as files, without Spark.

The server therefore answers within milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable

from pipelines.formats.delta_files import open_or_create, query, quoted_text, to_rows
from pipelines.formats.tables import DECISIONS, GENERATED_CAPTIONS, VERDICTS
from pipelines.review.shown_captions import CHAMPION, TABLES, Selection, select
from pipelines.review.source_pictures import SourcePictures
from pipelines.review.verdicts import Texts


class DeltaStore:
    """Captions of one model for the pictures of one table, with verdicts, in Delta tables on a disk.

    Args:
        captions: table `generated_captions`.
        pictures: captioned table.
        verdicts: folder of the table `verdicts`, which is created if it does not exist. The folder of the table
            `decisions` has the same parent folder.
        table: full name of the captioned table.
        model: full name of the model.
        version: version whose captions are read: a number, `champion` or `all` (see `shown_captions.select`).
        has_texts: whether the captioned table is table `samples`, which has human texts.
        find_champion: function that returns number and digest of the champion in the model registry (see
            `shown_captions.select`). If the function returns None, table `decisions` names the champion.
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
        version: str = CHAMPION,
        find_champion: Callable[[], tuple[str, str | None] | None] = lambda: None,
    ) -> None:
        self._captions = captions
        self._pictures = SourcePictures(pictures)
        self._has_texts = has_texts
        self._verdicts = open_or_create(verdicts, VERDICTS)
        self._decisions = open_or_create(verdicts.parent / DECISIONS.name, DECISIONS)
        self._version, self._find_champion = version, find_champion
        self._values = Selection(*map(quoted_text, (table, model, version)))

    def read_captions(self) -> list[dict[str, Any]]:
        """Read the newest versions of the tables. See `CaptionStore.read_captions`."""
        tables = dict(zip(TABLES, (self._captions, self._verdicts, self._decisions), strict=True))
        for table in tables.values():
            table.update_incremental()
        missing = [
            f"{definition.name}.{name}"
            for definition in (GENERATED_CAPTIONS, VERDICTS)
            for name in {*definition.names} - {field.name for field in tables[definition.name].schema().fields}
        ]
        champion = self._find_champion() if self._version == CHAMPION else None
        sql = select({name: name for name in TABLES}, self._values, self._version, missing, champion)
        return to_rows(query(tables, sql).read_all())

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

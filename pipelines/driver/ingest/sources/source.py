"""The class `Source`, and the check of a source's columns. Opening a source of any kind returns a `Source`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from pipelines.config import ColumnSplitConfig, DataConfig
from pipelines.driver.ingest.sources.walk import PassedOver
from pipelines.errors import UserError
from pipelines.executor.ingest.records.record import Read
from vlm.errors import nearest


class SourceRows(NamedTuple):
    """Raw rows of a source.

    Attributes:
        frame: raw rows, with columns that depend on the kind of source.
        read: parser that converts batches of `frame` to records on an executor.
    """

    frame: DataFrame
    read: Read


@dataclass(frozen=True)
class Covered:
    """Pictures in `samples` for which the source returns all current rows, so that an ingest can find deleted rows.

    A covered picture is removed if the rows lack the picture, or lack one of its texts.

    Attributes:
        file: name of the file from which the rows come, as at the beginning of `source_row`.
        image_ids: ids (column `image_id`) of the covered pictures, or None if all pictures that have come from `file`
            are covered.
    """

    file: str
    image_ids: DataFrame | None = None

    def select(self, samples: DataFrame) -> DataFrame:
        """Select the covered pictures from rows of `samples`."""
        if self.image_ids is None:
            return samples.filter(F.col("source_row").startswith(f"{self.file}#"))
        return samples.join(self.image_ids, "image_id", "left_semi")


@dataclass(frozen=True)
class Source:
    """An opened source, whose rows are not decoded yet.

    Attributes:
        rows: raw rows of the pending items, or None if no item is pending.
        ingest_id: hash of the name and the state of the source. This hash stays the same if the source does not change.
        pending: items (ledger.ITEMS) that have not been ingested in their current state: an Arrow table, or a DataFrame
            if there may be too many items for the driver.
        unchanged: number of items that have been ingested in their current state.
        covered: pictures that are removed from `samples` if the rows no longer contain them, or None to remove nothing.
        passed_over: files and folders of the source that are not read, with the reasons.
        passed_over_count: number of all files and folders that are not read, by reason; None if `passed_over` lists all
            of these files and folders.
        counted: number of pending items if `pending` is a DataFrame, else None.
    """

    rows: SourceRows | None
    ingest_id: str
    pending: pa.Table | DataFrame
    unchanged: int
    covered: Covered | None = None
    passed_over: tuple[PassedOver, ...] = ()
    passed_over_count: Mapping[str, int] | None = None
    counted: int | None = None

    @property
    def num_pending(self) -> int:
        """Number of items that have not been ingested in their current state."""
        if self.counted is not None:
            return self.counted
        assert isinstance(self.pending, pa.Table)
        return len(self.pending)


def used_columns(config: DataConfig) -> dict[str, str]:
    """Return a dict from the setting of a used column, such as `data.source.columns.text`, to the column's name."""
    used = {f"data.source.columns.{purpose}": name for purpose, name in config.source.columns.named.items()}
    if isinstance(config.split, ColumnSplitConfig):
        used["data.split.column"] = config.split.column
    return used


def require_columns(config: DataConfig, found: Sequence[str], where: str) -> None:
    """Check that a source has all columns of its config.

    Raises:
        UserError: a column is missing. The error names the setting and suggests the most similar column.
    """
    wanted = used_columns(config)
    missing = {setting: name for setting, name in wanted.items() if name not in found}
    if missing:
        unused = [column for column in found if column not in wanted.values()]
        suggestions = [f"--set {setting}={_suggest(name, unused)}" for setting, name in missing.items()]
        fix = f"set the right column with {' '.join(suggestions)} on the command line"
        if any("\ufffd" in column for column in found):
            fix = "give a file of text in UTF-8: the first row of this file contains bytes that are not text"
        raise UserError(
            f"the input has no column {', '.join(missing.values())}",
            where=where,
            got=f"columns {', '.join(column[:80] for column in found[:20])}",
            fix=fix,
        )


def _suggest(name: str, unused: Sequence[str]) -> str:
    """Return the most similar unused column, else the only unused column, else the placeholder COLUMN."""
    return next(iter(nearest(name, unused) or (unused if len(unused) == 1 else ())), "COLUMN")

"""Record of failed and killed caption jobs. A repeated job counts the errors and the drift of failed jobs as its own.

A job writes the captions and errors of all its rows before it fails because of too many errors or because of drift.
When a scheduler repeats the job, no row is left to caption. Without a record, the repeated job would find neither an
error nor drift, and would succeed. Therefore two small files are stored in the folder of the caption files. One file
has the time of the first failed job, and the other file has the figures of the last job that failed because of drift.
The files belong to one request: table, columns, folder of the pictures, condition, model and settings.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from pipelines.driver.caption.source_table import SourceTable
from pipelines.executor.caption import UNREADABLE
from vlm.config import Config
from vlm.files import atomic_write, read_json


class ComparedRows(Config):
    """Number of rows of a job with a caption or an error, and the figures that are compared with the evaluation."""

    rows: int
    figures: dict[str, float]


@dataclass(frozen=True)
class FailedJobs:
    """Failed and killed jobs of a request since the last successful job of the request.

    Attributes:
        folder: folder of the caption files.
        request: hash of the parts of the request that are not in the name of the folder.
    """

    folder: Path
    request: str

    @property
    def _open(self) -> Path:
        return self.folder / f"open-{self.request}.json"

    @property
    def _drift(self) -> Path:
        return self.folder / f"drift-{self.request}.json"

    def since(self) -> datetime | None:
        """Return the time of the first job that called `open` after the last call of `close`, or None.

        All rows that these jobs have written have this time or a later time in column captioned_at.
        """
        return datetime.fromisoformat(read_json(self._open)["since"]) if self._open.exists() else None

    def open(self, started_at: datetime) -> None:
        """Store the start time of a job that will caption rows. If the time of an earlier job is stored, keep it."""
        if not self._open.exists():
            with atomic_write(self._open) as temporary:
                temporary.write_text(json.dumps({"since": started_at.isoformat()}), encoding="utf-8")

    def close(self) -> None:
        """Forget the failed jobs. A later job has counted the rows of the failed jobs, and the share of errors was
        small enough."""
        self._open.unlink(missing_ok=True)

    def drifted_rows(self) -> ComparedRows | None:
        """Return the number of rows and the figures of the last job that failed because of drift, or whose comparison
        has not ended, or None."""
        return ComparedRows.model_validate(read_json(self._drift)) if self._drift.exists() else None

    def keep_drift(self, compared: ComparedRows) -> None:
        """Before a job is compared, remember the number of rows and the figures, in case the job fails."""
        with atomic_write(self._drift) as temporary:
            temporary.write_text(compared.model_dump_json(), encoding="utf-8")

    def forget_drift(self) -> None:
        """Forget the drift. Either a later job without drift has compared enough rows, or drift is accepted."""
        self._drift.unlink(missing_ok=True)


def count_since(
    captions: DataFrame, source: SourceTable, since: datetime | None, started_at: datetime | None
) -> dict[str, int]:
    """Count the rows that failed jobs have written (failed_rows), and the errors among these rows (failed_errors).

    Rows that the source no longer has are not counted. Return an empty dict if there is no failed job.

    Args:
        captions: rows of `generated_captions` for the table and the model.
        source: table to caption.
        since: time of the first failed job, or None if there is no failed job.
        started_at: time of this job, whose own rows are not counted, or None if this job has captioned no row.
    """
    if since is None or since == started_at:
        return {}
    # A row that kept its caption because a job could not read its picture has the time of that job in `source_file`.
    kept_at = F.timestamp_micros(F.expr(f"try_cast(substring_index(source_file, '{UNREADABLE}', -1) AS BIGINT)"))
    is_kept = F.coalesce(F.col("source_file").startswith(UNREADABLE), F.lit(False))
    rows = captions.withColumn("time", F.when(is_kept, kept_at).otherwise(F.col("captioned_at")))
    rows = rows.where(F.col("time") >= since)
    if started_at is not None:
        rows = rows.where(F.col("time") != started_at)
    counts = rows.join(source.rows.select("image_id"), "image_id", "left_semi")
    has_error = F.col("error").isNotNull() | is_kept
    found = counts.agg(F.count("*").alias("failed_rows"), F.count_if(has_error).alias("failed_errors")).head()
    assert found is not None
    return found.asDict()

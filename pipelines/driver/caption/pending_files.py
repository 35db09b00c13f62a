"""Captions on their way into the table: files that executors wrote, merged by whichever driver finds them.

A folder belongs to one key (table, model version, settings), not to one job. A job that is killed leaves files, and the
next one of its key merges them. Two jobs of one key at the same time merge each other's: a row is merged twice as it
is once, and a file that has gone was merged by the other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from delta.tables import DeltaTable
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from pipelines.driver.delta.retry import undisturbed
from pipelines.executor.caption import STAGED
from pipelines.formats.tables import GENERATED_CAPTIONS
from pipelines.platform import Platform

logger = logging.getLogger(__name__)

MERGED_ROWS = 100_000
"""Rows of one commit, about: they pass through the driver, some hundred bytes each."""
STALE = timedelta(days=1)


@dataclass(frozen=True)
class Staged:
    """The files of one key.

    Attributes:
        folder: where they are.
        key: columns and values that all rows share.
    """

    folder: Path
    key: dict[str, str]

    def open(self) -> None:
        """Make the folder, and remove what writers left behind that did not live to finish a file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(".*.tmp"):
            if time.time() - path.stat().st_mtime > STALE.total_seconds():
                path.unlink(missing_ok=True)

    def files(self) -> list[Path]:
        """Complete files."""
        return sorted(self.folder.glob("*.parquet"))

    def num_rows(self) -> int:
        """Rows in them, by their footers: asked twice a second while a job runs."""
        total = 0
        for path in self.files():
            with suppress(FileNotFoundError):  # another driver has merged it meanwhile
                total += pq.read_metadata(path).num_rows
        return total

    def merge(self, spark: SparkSession, platform: Platform) -> int:
        """Bring all files into `generated_captions` and remove them; returns how many rows they had.

        Raises:
            StageFailed: other writers were faster time and again; nothing is lost.
        """
        total, chunk, files = 0, [], []
        for path, rows in self._tables():
            chunk.append(rows)
            files.append(path)
            if sum(map(len, chunk)) >= MERGED_ROWS:
                total += self._commit(spark, platform, chunk, files)
                chunk, files = [], []
        return total + self._commit(spark, platform, chunk, files)

    def _tables(self) -> Iterator[tuple[Path, pa.Table]]:
        """Each file and its rows; files that another driver has merged meanwhile are passed over."""
        for path in self.files():
            try:
                yield path, pq.read_table(path)
            except FileNotFoundError:
                continue

    def _commit(self, spark: SparkSession, platform: Platform, chunk: list[pa.Table], files: list[Path]) -> int:
        rows = pa.concat_tables([STAGED.empty_table(), *chunk])
        if rows.num_rows:
            came = _newest(spark.createDataFrame(rows))
            table = platform.table(GENERATED_CAPTIONS.name)
            undisturbed(lambda: _merge(spark, table, came, self.key), where=table)
        for path in files:
            path.unlink(missing_ok=True)
        return int(rows.num_rows)


def of_key(key: dict[str, str]) -> Column:
    """Whether a row of the table, known as `there`, has these values; as literals they let Delta skip files."""
    condition = F.lit(True)
    for column, value in key.items():
        condition &= F.col(f"there.{column}") == value
    return condition


def _newest(rows: DataFrame) -> DataFrame:
    """One row a picture: a retried task or a second job may have written it too."""
    order = Window.partitionBy("image_id").orderBy(F.desc("captioned_at"), F.desc("source_version"), "sha256")
    return rows.withColumn("nth", F.row_number().over(order)).filter("nth = 1").drop("nth")


def _merge(spark: SparkSession, name: str, came: DataFrame, key: dict[str, str]) -> None:
    same = of_key(key) & (F.col("there.image_id") == F.col("came.image_id"))
    columns: dict[str, str | Column] = {name: f"came.{name}" for name in GENERATED_CAPTIONS.names}
    newer = "came.captioned_at > there.captioned_at"
    other = f"NOT came.unchanged AND {newer} AND (there.error IS NOT NULL OR NOT (there.sha256 <=> came.sha256))"
    table = DeltaTable.forName(spark, name).alias("there")
    (
        table.merge(came.alias("came"), same)
        .whenMatchedUpdate(condition=other, set=columns)
        .whenMatchedUpdate(
            condition="came.source_version > there.source_version", set={"source_version": "came.source_version"}
        )
        .whenNotMatchedInsert(condition="NOT came.unchanged", values=columns)
        .execute()
    )

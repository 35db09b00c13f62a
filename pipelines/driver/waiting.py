"""Pictures that wait for the plan: the folder that executors write them into, and how rows get them back."""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

from pyspark.sql import DataFrame
from pyspark.sql.types import BinaryType, StructType

from pipelines.executor.staging import PLACE, with_pictures
from pipelines.platform import Platform

logger = logging.getLogger(__name__)

PREFIX = "pictures-"
FILE_BYTES = 128 * 2**20
"""Bytes of pictures that go into one file of a table, about."""
STALE = timedelta(days=2)


@dataclass(frozen=True)
class Waiting:
    """Pictures of one ingest.

    Attributes:
        folder: where they are; of this ingest alone.
    """

    folder: Path

    def join(self, rows: DataFrame) -> DataFrame:
        """Rows with their pictures, in a column `image`. They have a column `picture` (PLACE, among others).

        Neither the pictures nor the rows of others are shuffled: rows go, a few hundred bytes each, to where a task
        reads the pictures of its part from their files.
        """
        size = sum(path.stat().st_size for path in self.folder.iterdir())
        tasks = max(rows.sparkSession.sparkContext.defaultParallelism, size // FILE_BYTES)
        placed = rows.select("*", *(f"picture.{name}" for name in PLACE.names)).drop("picture")
        parts = placed.repartitionByRange(tasks, *PLACE.names[:2]).sortWithinPartitions(*PLACE.names)
        schema = StructType(placed.schema.fields[: -len(PLACE)]).add("image", BinaryType())
        return parts.mapInArrow(partial(with_pictures, folder=str(self.folder)), schema)


@contextmanager
def waiting_pictures(platform: Platform) -> Iterator[Waiting]:
    """A folder for as long as the block runs. What killed ingests left behind is removed once it is old."""
    folder = platform.folder("staged").absolute()
    for path in folder.glob(f"{PREFIX}*"):
        if time.time() - path.stat().st_mtime > STALE.total_seconds():
            logger.info("removing pictures that an ingest left behind when it was killed: %s", path)
            shutil.rmtree(path, ignore_errors=True)
    waiting = Waiting(folder / f"{PREFIX}{uuid.uuid4().hex}")
    waiting.folder.mkdir(parents=True)
    try:
        yield waiting
    finally:
        shutil.rmtree(waiting.folder, ignore_errors=True)

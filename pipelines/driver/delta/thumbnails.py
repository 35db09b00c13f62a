"""Thumbnails of the pictures in table `samples`, for pages."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from pyspark.sql import DataFrame

from pipelines.driver.delta.settings import bounded_batches
from pipelines.executor.thumbnail import with_thumbnails


def read_thumbnails(samples: DataFrame, image_ids: Sequence[str]) -> dict[str, bytes | None]:
    """Make thumbnails of pictures in `samples` on executors. Return a dict from image_id to thumbnail.

    The thumbnail is None if the picture cannot be decoded. A picture that is no longer in the table is not in the dict.
    """
    chosen = samples.where(samples.image_id.isin(list(image_ids))).select("image_id", "image")
    with bounded_batches(samples.sparkSession):
        thumbnails = partial(with_thumbnails, column="image", max_pixels=sys.maxsize)  # ingest has checked the sizes
        rows = chosen.mapInArrow(thumbnails, "image_id string, thumbnail binary").collect()
    return {row["image_id"]: row["thumbnail"] and bytes(row["thumbnail"]) for row in rows}

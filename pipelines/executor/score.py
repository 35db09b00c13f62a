"""Evaluation as Spark runs it: numbers of shard rows in, scores and thumbnails out.

Like captioning, scoring imports its worker module inside the function that runs on the executor.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from pipelines.shards import Shards
from vlm.config import Config
from vlm.image import open_image

SCORE_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("references", pa.list_(pa.string()), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("loss", pa.float64(), nullable=False),
        pa.field("blind_loss", pa.float64()),
        pa.field("num_targets", pa.int64(), nullable=False),
    ]
)

THUMBNAIL_SCHEMA = pa.schema(
    [pa.field("image_id", pa.string(), nullable=False), pa.field("thumbnail", pa.binary(), nullable=False)]
)
THUMBNAIL_SIDE = 256


class ScoreJob(Config):
    """What an executor needs to know: folders of the model and of the shards, and how many cores it has."""

    model_folder: str
    shards_folder: str
    threads: int


def score_batches(job: ScoreJob, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Scores of the shard rows that batches with a column `id` number, as SCORE_SCHEMA."""
    from pipelines.worker.caption import limit_threads, load_captioner
    from pipelines.worker.score import score_rows

    limit_threads(job.threads)
    captioner = load_captioner(job.model_folder)
    shards = Shards.open(Path(job.shards_folder))
    for batch in batches:
        scores = score_rows(captioner, shards, batch.column("id").to_pylist())
        yield pa.RecordBatch.from_pylist([vars(score) for score in scores], schema=SCORE_SCHEMA)


def thumbnail_batches(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """JPEG thumbnails of batches with columns image_id and image (pictures of table samples), as THUMBNAIL_SCHEMA."""
    for batch in batches:
        thumbnails = []
        for image in batch.column("image"):
            picture, _ = open_image(image.as_py(), max_pixels=sys.maxsize, min_side=1)  # ingest has judged it
            picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=88)
            thumbnails.append(buffer.getvalue())
        yield pa.RecordBatch.from_arrays(
            [batch.column("image_id"), pa.array(thumbnails, pa.binary())], schema=THUMBNAIL_SCHEMA
        )

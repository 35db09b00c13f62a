"""Evaluation as Spark runs it: numbers of shard rows in, scores and looks out; pictures in, thumbnails out.

Like captioning, scoring imports its worker module inside the function that runs on the executor.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.executor.model_cache import local_copy
from pipelines.formats.shards import Shards
from pipelines.formats.tables import TEXT_TYPE
from vlm.config import Config

SCORE_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("references", pa.list_(pa.string()), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("loss", pa.float64(), nullable=False),
        pa.field("blind_loss", pa.float64()),
        pa.field("blank_loss", pa.float64(), nullable=False),
        pa.field("noise_loss", pa.float64(), nullable=False),
        pa.field("num_targets", pa.int64(), nullable=False),
        pa.field("num_correct", pa.int64(), nullable=False),
        pa.field("num_tokens", pa.int64(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("mean_logprob", pa.float64()),
        pa.field("brightness", pa.float64(), nullable=False),
        pa.field("contrast", pa.float64(), nullable=False),
    ]
)

LOOK_SCHEMA = pa.schema(
    [
        pa.field("place", pa.int64(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("look", pa.binary(), nullable=False),
        pa.field("texts", pa.list_(TEXT_TYPE), nullable=False),
    ]
)
LOOK_SIDE = 8
"""A look is a picture of LOOK_SIDE x LOOK_SIDE colours, its bytes."""


class ScoreJob(Config):
    """What an executor needs to know: folders of the model and of the shards, and how many cores it has.

    `remote` says that the model's folder is on a network.
    """

    model_folder: Path
    remote: bool
    shards_folder: str
    threads: int


def score_batches(job: ScoreJob, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Scores of the shard rows that batches with a column `id` number, as SCORE_SCHEMA."""
    from pipelines.worker.caption import limit_threads, load_captioner
    from pipelines.worker.score import score_rows

    limit_threads(job.threads)
    folder = local_copy(job.model_folder) if job.remote else job.model_folder
    captioner = load_captioner(str(folder))
    shards = Shards.open(Path(job.shards_folder))
    for batch in batches:
        scores = score_rows(captioner, shards, batch.column("id").to_pylist())
        yield pa.RecordBatch.from_pylist([vars(score) for score in scores], schema=SCORE_SCHEMA)


def look_batches(folders: tuple[str, str], batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Looks of the rows of two shard folders, one after the other, as LOOK_SCHEMA.

    A batch's column `id` numbers rows: those of the first folder by their number, of the second by -1 minus it.
    """
    first, second = (Shards.open(Path(folder)) for folder in folders)
    for batch in batches:
        looks = []
        for place in batch.column("id").to_pylist():
            row = first.row(place) if place >= 0 else second.row(-1 - place)
            small = Image.fromarray(row.pixels).resize((LOOK_SIDE, LOOK_SIDE), Image.Resampling.BOX)
            texts = [{"prompt": prompt, "text": text} for prompt, text in row.texts]
            looks.append(
                {"place": place, "image_id": row.image_id, "look": np.asarray(small).tobytes(), "texts": texts}
            )
        yield pa.RecordBatch.from_pylist(looks, schema=LOOK_SCHEMA)

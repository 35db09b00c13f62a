"""Evaluation on executors: functions that receive indices of shard rows, and yield scores, drawings of attention or
colour grids.

The modules of `pipelines.worker`, which import torch, are imported inside the functions, so that the driver can import
this module without torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.executor.shared_model import load_shared_captioner
from pipelines.formats.row_scores import SCORE_SCHEMA
from pipelines.formats.shards import Shards
from pipelines.formats.tables import TEXT_TYPE
from vlm.config import Config, GenerationConfig

if TYPE_CHECKING:
    from vlm.captioner import Captioner

COLOUR_GRID_SCHEMA = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("grid", pa.binary(), nullable=False),
        pa.field("texts", pa.list_(TEXT_TYPE), nullable=False),
    ]
)
ATTENTION_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("titles", pa.list_(pa.string()), nullable=False),
        pa.field("pictures", pa.list_(pa.binary()), nullable=False),
    ]
)
"""Schema of attention drawings. A row has one title and one JPEG file for each drawn word of one caption."""
GRID_SIDE = 8
"""Width and height of a colour grid in pixels. A colour grid is a small copy of a picture, stored as RGB bytes."""


class ScoreJob(Config):
    """Settings that executors need to score rows of shards.

    Attributes:
        model_folder: folder of the model's weights, config and tokenizer.
        model_digest: digest of the model, or empty if it is not known.
        remote: whether `model_folder` is on a network drive.
        shards_folder: shard folder of the split to score.
        threads: number of torch threads in each Spark task.
        settings: generation settings, or None for the model's own settings at temperature 0.
    """

    model_folder: Path
    model_digest: str
    remote: bool
    shards_folder: str
    threads: int
    settings: GenerationConfig | None


def score_batches(job: ScoreJob, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Score the shard rows whose indices are in the column `id`. Yield batches of the schema SCORE_SCHEMA."""
    from pipelines.worker.score import score_rows

    captioner, settings = _load(job)
    shards = Shards.open(Path(job.shards_folder))
    for batch in batches:
        scores = score_rows(captioner, shards, batch.column("id").to_pylist(), settings)
        yield pa.RecordBatch.from_pylist([vars(score) for score in scores], schema=SCORE_SCHEMA)


def attention_batches(job: ScoreJob, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Draw where the model looked when it generated the words of captions.

    Yield batches of the schema ATTENTION_SCHEMA.

    The columns of a batch are `row` (index of a shard row), `prompt` and `caption`.
    """
    from pipelines.worker.attention import draw_row_attention

    captioner, settings = _load(job)
    shards = Shards.open(Path(job.shards_folder))
    for batch in batches:
        drawn = []
        for item in batch.to_pylist():
            row, prompt = item["row"], item["prompt"]
            words = draw_row_attention(captioner, shards.row(row), prompt, item["caption"], settings)
            titles, pictures = [title for title, _ in words], [picture for _, picture in words]
            drawn.append({"row": row, "prompt": prompt, "titles": titles, "pictures": pictures})
        yield pa.RecordBatch.from_pylist(drawn, schema=ATTENTION_SCHEMA)


def _load(job: ScoreJob) -> tuple[Captioner, GenerationConfig]:
    """Load the model of a job, and return its captioner and the generation settings of the job."""
    captioner = load_shared_captioner(job.model_folder, job.model_digest, remote=job.remote, threads=job.threads)
    return captioner, job.settings or captioner.settings(temperature=0.0)


def colour_grid_batches(folders: tuple[str, str], batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Compute the colour grids of pictures in two shard folders. Yield batches of the schema COLOUR_GRID_SCHEMA.

    The column `id` of a batch contains row indices. An index n >= 0 is row n of the first folder, and an index n < 0 is
    row -1 - n of the second folder.
    """
    first, second = (Shards.open(Path(folder)) for folder in folders)
    for batch in batches:
        grids = []
        for index in batch.column("id").to_pylist():
            row = first.row(index) if index >= 0 else second.row(-1 - index)
            small = Image.fromarray(row.pixels).resize((GRID_SIDE, GRID_SIDE), Image.Resampling.BOX)
            texts = [{"prompt": prompt, "text": text} for prompt, text in row.texts]
            grids.append(
                {"index": index, "image_id": row.image_id, "grid": np.asarray(small).tobytes(), "texts": texts}
            )
        yield pa.RecordBatch.from_pylist(grids, schema=COLOUR_GRID_SCHEMA)

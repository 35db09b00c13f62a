"""Captioning as Spark runs it: Arrow batches of pictures in, Arrow batches of captions out.

The one function of this room that uses torch, and only when it runs: the worker module is imported inside it, so that
a driver can name this function without loading the library.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from pipelines.config import LimitsConfig
from vlm.config import Config, GenerationConfig, Precision

CAPTION_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("error", pa.string()),
        pa.field("sha256", pa.string()),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("mean_logprob", pa.float64()),
    ]
)


class CaptionJob(Config):
    """What an executor needs to know: the folder of the model, how to run it and decode, and how many cores it has."""

    model_folder: str
    precision: Precision
    prompt: str
    settings: GenerationConfig
    limits: LimitsConfig
    threads: int


def caption_batches(job: CaptionJob, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Captions of batches with columns image_id (string) and image (binary, or base64 text), as CAPTION_SCHEMA."""
    from pipelines.worker.caption import limit_threads, load_captioner

    limit_threads(job.threads)
    captioner = load_captioner(job.model_folder, job.precision)
    for batch in batches:
        images = batch.column("image").to_pylist()
        results = captioner.caption(images, [job.prompt] * len(images), job.settings, job.limits)
        yield pa.RecordBatch.from_arrays(
            [
                batch.column("image_id").cast(pa.string()),
                pa.array([r.caption for r in results], pa.string()),
                pa.array([r.error for r in results], pa.string()),
                pa.array([r.sha256 for r in results], pa.string()),
                pa.array([r.num_tokens for r in results], pa.int32()),
                pa.array([r.mean_logprob for r in results], pa.float64()),
            ],
            schema=CAPTION_SCHEMA,
        )

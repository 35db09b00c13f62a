"""Scores of a text-only model on executors: functions that receive window numbers and yield losses.

The modules of `pipelines.worker`, which import torch, are imported inside the functions, so the driver can import this
module without torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.executor.shared_model import load_shared_captioner
from vlm.config import Config

SCORES = pa.schema(
    [
        pa.field("window", pa.int64(), nullable=False),
        pa.field("loss", pa.float64(), nullable=False),  # sum over the target tokens, in nats
        pa.field("targets", pa.int64(), nullable=False),
        pa.field("correct", pa.int64(), nullable=False),
    ]
)
BATCH_WINDOWS = 64


class TextScoreJob(Config):
    """Settings that executors need to score windows of texts.

    Attributes:
        model_folder: folder of the model's weights, config and tokenizer.
        model_digest: digest of the model, or empty if it is not known.
        remote: whether `model_folder` is on a network drive.
        tokens: path of the token file of the split.
        threads: number of torch threads in each Spark task.
    """

    model_folder: Path
    model_digest: str
    remote: bool
    tokens: Path
    threads: int


def score_batches(job: TextScoreJob, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Score the windows whose numbers are in column `id`. Yield batches of the schema SCORES."""
    from pipelines.worker.text_score import score_windows

    captioner = load_shared_captioner(job.model_folder, job.model_digest, remote=job.remote, threads=job.threads)
    for batch in batches:
        numbers = batch.column("id").to_numpy()
        for first in range(0, len(numbers), BATCH_WINDOWS):
            chosen = numbers[first : first + BATCH_WINDOWS].astype(np.int64)
            columns = [pa.array(values) for values in (chosen, *score_windows(captioner, job.tokens, chosen))]
            yield pa.RecordBatch.from_arrays(columns, names=SCORES.names).cast(SCORES)

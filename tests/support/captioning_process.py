"""Process that captions pictures as a Spark task does, without Spark, and keeps the model in memory.

python captioning_process.py MODEL OUTPUT PRECISION

The process prints one line of JSON: the captions, their mean log-probabilities, and the seconds that the first and the
second batch of pictures have taken. The process ends when its standard input ends.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pictures import png

from pipelines.config import LimitsConfig
from pipelines.executor.caption import CaptionJob, caption_batches
from vlm.config import GenerationConfig, Precision

ROWS = 4


def caption_job(model: Path, output: Path, precision: Precision, *, remote: bool = False) -> CaptionJob:
    """Return a job that uses one torch thread, and generates at most three tokens for each picture."""
    constants = ("model_name", "model_version", "settings_hash", "prompt", "settings", "source_table", "run_id")
    return CaptionJob(
        model_folder=model,
        model_digest="",
        remote=remote,
        precision=precision,
        prompt="",
        settings=GenerationConfig(max_new_tokens=3),
        limits=LimitsConfig(),
        image_root=None,
        threads=1,
        output_folder=output,
        rows_per_file=512,
        constants={"source_version": 0, **dict.fromkeys(constants, "")},
        started_at=datetime.now(UTC),
    )


def caption_rows(job: CaptionJob) -> list[dict[str, Any]]:
    """Caption ROWS pictures, and return the captions and their mean log-probabilities."""
    names = [str(number) for number in range(ROWS)]
    pictures = [png(number) for number in range(ROWS)]
    columns = {"image_id": names, "image": pictures, "source_file": ["file"] * ROWS}
    columns |= dict.fromkeys(("known", "known_error"), pa.nulls(ROWS, pa.string()))
    batch = pa.RecordBatch.from_pydict(columns)
    earlier = {*job.output_folder.glob("*.parquet")}
    list(caption_batches(job, iter([batch])))
    [file] = {*job.output_folder.glob("*.parquet")} - earlier
    rows: list[dict[str, Any]] = (
        pq.read_table(file).select(["image_id", "caption", "error", "mean_logprob"]).to_pylist()
    )
    return rows


if __name__ == "__main__":
    import torch  # noqa: F401  # the measured time does not include the import of torch

    import vlm.captioner  # noqa: F401

    settings = caption_job(Path(sys.argv[1]), Path(sys.argv[2]), Precision(sys.argv[3]))
    seconds = []
    for _ in range(2):
        started = time.monotonic()
        captioned = caption_rows(settings)
        seconds.append(time.monotonic() - started)
    print(json.dumps({"rows": captioned, "seconds": seconds}), flush=True)
    sys.stdin.read()

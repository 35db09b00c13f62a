"""Captioning as Spark runs it: Arrow batches of pictures in, files of captions out.

What a task has captioned is in a file of the job's folder before the task says so. Whatever is killed afterwards, the
next job finds the file and need not run the model again. Here torch is used, and only when a function runs: the worker
modules are imported inside, so that a driver can name these functions without loading the library.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import LimitsConfig
from pipelines.executor.model_cache import on_this_machine
from pipelines.formats.caption_stats import Tally, total
from pipelines.formats.tables import GENERATED_CAPTIONS
from vlm.config import Config, GenerationConfig, Precision
from vlm.files import atomic_write
from vlm.image import pixel_stats

if TYPE_CHECKING:
    from vlm.captioner import Captioner, CaptionResult, DecodedPicture

STAGED = GENERATED_CAPTIONS.arrow_schema.append(pa.field("unchanged", pa.bool_(), nullable=False))
"""A row of the table; where `unchanged`, the picture is the one that was captioned before, and nothing else is new."""
DONE = pa.schema([pa.field("tally", pa.string(), nullable=False)])
"""What became of the rows of one file: a Tally as JSON."""


class CaptionJob(Config):
    """What an executor needs to know.

    Attributes:
        model_folder: weights, config and tokenizer.
        remote: whether that is on a network.
        precision: what the model computes in.
        prompt: of all pictures.
        settings: how to decode.
        limits: what a picture may be.
        threads: cores of a task.
        staging: folder for the files, a plain path that every executor sees.
        rows: of a file at most: what is lost where a task is killed.
        constants: columns that are the same for all rows.
        at: when the job began.
    """

    model_folder: Path
    remote: bool
    precision: Precision
    prompt: str
    settings: GenerationConfig
    limits: LimitsConfig
    threads: int
    staging: Path
    rows: int
    constants: dict[str, str | int]
    at: datetime


def caption_batches(job: CaptionJob, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Caption pictures into files; one DONE row a file.

    Args:
        job: how, and where to.
        batches: columns image_id (string), image (binary, or base64 text) and known (SHA-256 of the picture that was
            captioned before, or null: an equal one is not captioned again).
    """
    from pipelines.worker.caption import limit_threads, load_captioner
    from pipelines.worker.data.batches import map_ahead
    from vlm.captioner import BATCH_ROWS

    limit_threads(job.threads)
    folder = on_this_machine(job.model_folder) if job.remote else job.model_folder
    captioner = load_captioner(str(folder), job.precision)
    rows: list[dict[str, Any]] = []
    counted: list[Tally] = []
    decoded = map_ahead(partial(_decoded, captioner, job), batches, workers=1)
    for pictures in _groups(decoded, BATCH_ROWS):
        for row, tally in _captions(captioner, job, pictures):
            rows.append(row)
            counted.append(tally)
        if len(rows) >= job.rows:
            yield _written(job, rows, counted)
            rows, counted = [], []
    if rows:
        yield _written(job, rows, counted)


Picture = tuple[str, "str | None", "DecodedPicture"]
"""Id, SHA-256 of what was captioned before, and the picture."""


def _decoded(captioner: Captioner, job: CaptionJob, batch: pa.RecordBatch) -> list[Picture]:
    ids, images, known = (batch.column(name).to_pylist() for name in ("image_id", "image", "known"))
    return list(
        zip(
            ids,
            known,
            captioner.decode(images, max_pixels=job.limits.max_pixels, min_side=job.limits.min_side),
            strict=True,
        )
    )


def _groups(batches: Iterator[list[Picture]], size: int) -> Iterator[list[Picture]]:
    """Batches joined until they have `size` rows: Arrow's are bounded in bytes, the model wants many."""
    group: list[Picture] = []
    for batch in batches:
        group += batch
        if len(group) >= size:
            yield group
            group = []
    if group:
        yield group


def _captions(captioner: Captioner, job: CaptionJob, pictures: list[Picture]) -> Iterator[tuple[dict[str, Any], Tally]]:
    """A STAGED row a picture, and what it counts for: nothing, where the picture is the one captioned before."""
    fresh = [picture for _, known, picture in pictures if known is None or known != picture.sha256]
    results = iter(captioner.caption_decoded(fresh, [job.prompt] * len(fresh), job.settings))
    for image_id, known, picture in pictures:
        row = job.constants | {"image_id": image_id, "captioned_at": job.at, "sha256": picture.sha256}
        if known is not None and known == picture.sha256:
            yield row | {"num_tokens": 0, "unchanged": True}, Tally()
            continue
        result = next(results)
        said = {
            "caption": result.caption,
            "error": result.error,
            "num_tokens": result.num_tokens,
            "mean_logprob": result.mean_logprob,
            "unchanged": False,
        }
        yield row | said, _tally(result, picture, changed=known is not None)


def _tally(result: CaptionResult, picture: DecodedPicture, *, changed: bool) -> Tally:
    if result.caption is None or result.mean_logprob is None:
        tally = Tally(errors=1)
    else:
        tally = Tally.of_caption(result.caption, result.mean_logprob)
    light = {} if picture.pixels is None else {"pictures": 1, **pixel_stats(picture.pixels)._asdict()}
    return tally.model_copy(update={"changed": int(changed), **light})


def _written(job: CaptionJob, rows: list[dict[str, Any]], counted: list[Tally]) -> pa.RecordBatch:
    """Write a file, whole or not at all."""
    with atomic_write(job.staging / f"{uuid.uuid4().hex}.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(rows, STAGED), temporary)
    return pa.RecordBatch.from_pylist([{"tally": total(counted).model_dump_json()}], DONE)

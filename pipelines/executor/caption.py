"""Captioning on executors: a task receives Arrow batches of pictures and writes Parquet files of captions.

A Spark task writes its caption files to the job's folder, and then reports statistics to the driver. If a job is
killed, the next job finds the caption files that are complete, and does not caption the pictures of these files again.
The modules of `pipelines.worker`, which import torch, are imported inside the functions, so that the driver can import
this module without torch.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import LimitsConfig
from pipelines.executor.crash_guard import TOO_SLOW, Death, run_guarded
from pipelines.executor.ingest.records.pictures.root import PictureRoot, read_picture_column
from pipelines.executor.shared_model import load_shared_captioner
from pipelines.executor.time_limit import TimeLimitExceeded, time_limit
from pipelines.formats.caption_stats import CaptionStats, sum_stats
from pipelines.formats.tables import GENERATED_CAPTIONS
from vlm.config import Config, GenerationConfig, ImageConfig, Precision
from vlm.files import atomic_write
from vlm.image import load_decoders, picture_bytes, pixel_stats

if TYPE_CHECKING:
    from vlm.captioner import Captioner
    from vlm.generation.result import CaptionResult
    from vlm.inputs import DecodedPicture

PENDING_SCHEMA = GENERATED_CAPTIONS.arrow_schema.append(pa.field("unchanged", pa.bool_(), nullable=False))
"""Columns of `generated_captions`, and the column `unchanged`, which is true if the picture has not changed since the
last captioning (`_is_unchanged`)."""
UNREADABLE = "unreadable_file:"
"""First word of the error message of a picture that exists but cannot be read at present, for example because a server
is slow."""
STATS_SCHEMA = pa.schema([pa.field("stats", pa.string(), nullable=False)])
"""Schema of the row that a task sends to the driver. The row contains the CaptionStats of the task's rows as JSON."""


class CaptionJob(Config):
    """Settings that executors need to caption pictures.

    If a Spark task is killed, only the captions that the task has not yet written to a file are lost.

    Attributes:
        model_folder: folder of the model's weights, config and tokenizer.
        model_digest: digest of the model, or empty if it is not known.
        remote: whether `model_folder` is on a network drive.
        precision: number format in which the model computes, such as fp32.
        prompt: text before the caption, the same text for all pictures.
        settings: decoding settings.
        limits: limits on the size and the decoding time of a picture.
        image_root: folder or URL of the pictures, or None if the batches contain the pictures and not their paths.
        threads: number of torch threads in each Spark task.
        output_folder: folder of the caption files, which has the same path on every executor.
        rows_per_file: number of rows after which a task writes a file.
        constants: values of the columns that have the same value in all rows, by column name.
        started_at: time that is stored in all new rows. The time is the start of the job. If the table has rows with
            later times, the time is one microsecond after the newest row (`pipelines.driver.delta.row_times`).
    """

    model_folder: Path
    model_digest: str
    remote: bool
    precision: Precision
    prompt: str
    settings: GenerationConfig
    limits: LimitsConfig
    image_root: str | None
    threads: int
    output_folder: Path
    rows_per_file: int
    constants: dict[str, str | int | None]
    started_at: datetime


def caption_batches(job: CaptionJob, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Caption pictures and write the captions to files. Yield one row of STATS_SCHEMA at the end.

    Args:
        job: settings of the caption job.
        batches: batches with the columns image_id (string), image (binary, base64 text, or a path), known, known_error
            and source_file. `known` and `known_error` contain the SHA-256 and the error that were stored when the
            picture was last captioned; a value that was not stored is null. `source_file` identifies the data file of
            the row. An unchanged picture is not captioned again (`_is_unchanged`).
    """
    from pipelines.worker.data.batches import map_ahead
    from vlm.captioner import BATCH_ROWS

    load_decoders()
    captioner = load_shared_captioner(
        job.model_folder, job.model_digest, remote=job.remote, threads=job.threads, precision=job.precision
    )
    rows: list[dict[str, Any]] = []
    stats: list[CaptionStats] = []
    total = CaptionStats()
    if job.image_root is not None:
        batches = read_picture_column(batches, PictureRoot(job.image_root, job.limits.max_bytes))
    decoded = map_ahead(partial(_decode_batch, captioner.model.config.image, job), batches, workers=1)
    for pictures in _join_batches(decoded, BATCH_ROWS):
        for row, row_stats in _caption_pictures(captioner, job, pictures):
            rows.append(row)
            stats.append(row_stats)
        if len(rows) >= job.rows_per_file:
            _write_file(job, rows)
            total = sum_stats([total, *stats])
            rows, stats = [], []
    if rows:
        _write_file(job, rows)
    total = sum_stats([total, *stats])
    yield pa.RecordBatch.from_pylist([{"stats": total.model_dump_json()}], STATS_SCHEMA)


class Known(NamedTuple):
    """SHA-256 and error that were stored when a picture was last captioned. A value that was not stored is None."""

    sha256: str | None
    error: str | None


Picture = tuple[dict[str, str], Known, "DecodedPicture"]
"""Tuple of a picture's columns image_id and source_file, the result of its last captioning, and the decoded picture."""


def _decode_batch(config: ImageConfig, job: CaptionJob, batch: pa.RecordBatch) -> list[Picture]:
    """Decode the pictures of a batch in a child process, so that a bad picture cannot crash or block the Spark task."""
    rows = batch.select(["image_id", "source_file"]).to_pylist()
    images, *known = (batch.column(name).to_pylist() for name in ("image", "known", "known_error"))
    decode = partial(_decode_picture, config=config, limits=job.limits)
    pictures = run_guarded(images, decode, partial(_describe_death, limits=job.limits))
    problems = [None] * len(rows) if job.image_root is None else batch.column("problem").to_pylist()
    return [
        (row, Known(*before), picture if problem is None else picture._replace(error=problem))
        for row, before, picture, problem in zip(rows, zip(*known, strict=True), pictures, problems, strict=True)
    ]


def _decode_picture(image: bytes | str | None, config: ImageConfig, limits: LimitsConfig) -> DecodedPicture:
    from vlm.inputs import decode_picture

    try:
        with time_limit(limits.max_decode_seconds):
            return decode_picture(
                image, config, max_pixels=limits.max_pixels, min_side=limits.min_side, max_bytes=limits.max_bytes
            )
    except TimeLimitExceeded:
        return _describe_death(image, TOO_SLOW, limits)


def _describe_death(image: bytes | str | None, death: Death, limits: LimitsConfig) -> DecodedPicture:
    """Return an error message as the result for a picture that crashed the decoder or exceeded the time limit."""
    from vlm.inputs import DecodedPicture

    sha256 = hashlib.sha256(picture_bytes(image)).hexdigest()
    return DecodedPicture(None, sha256, ": ".join(death.describe(limits.max_decode_seconds)))


def _join_batches(batches: Iterator[list[Picture]], size: int) -> Iterator[list[Picture]]:
    """Join batches until each batch, except the last one, has at least `size` rows.

    Arrow batches may be too small for the model.
    """
    group: list[Picture] = []
    for batch in batches:
        group += batch
        if len(group) >= size:
            yield group
            group = []
    if group:
        yield group


def _caption_pictures(
    captioner: Captioner, job: CaptionJob, pictures: list[Picture]
) -> Iterator[tuple[dict[str, Any], CaptionStats]]:
    """For each picture, yield a row of the schema PENDING_SCHEMA and the picture's statistics.

    The statistics of an unchanged picture are zero.
    """
    changed = [picture for _, known, picture in pictures if not _is_unchanged(known, picture)]
    results = iter(captioner.caption_decoded(changed, [job.prompt] * len(changed), job.settings))
    for own, known, picture in pictures:
        row = job.constants | own | {"captioned_at": job.started_at, "read_at": job.started_at}
        row |= {"sha256": picture.sha256}
        if _is_unchanged(known, picture):
            yield row | {"num_tokens": 0, "unchanged": True}, CaptionStats()
            continue
        result = next(results)
        caption = {
            "caption": result.caption,
            "error": result.error,
            "num_tokens": result.num_tokens,
            "mean_logprob": result.mean_logprob,
            "unchanged": False,
        }
        yield row | caption, _count(result, picture, changed=known.sha256 is not None and picture.sha256 is not None)


def _is_unchanged(known: Known, picture: DecodedPicture) -> bool:
    """Return whether a picture has not changed since it was last captioned.

    A row without a picture, for example with a null or with the path of a missing file, has no SHA-256. A row without a
    SHA-256 is unchanged if the row has the same error as before. A row whose picture still cannot be read is unchanged
    even if the text of the error differs, because servers fail in several ways. On a night without new pictures, a few
    pictures that can never be read would otherwise be the only changed rows. The share of errors would then exceed
    every limit.
    """
    if picture.sha256 is not None:
        return picture.sha256 == known.sha256
    if picture.error is None or known.error is None:
        return False
    return picture.error == known.error or (picture.error.startswith(UNREADABLE) and known.error.startswith(UNREADABLE))


def _count(result: CaptionResult, picture: DecodedPicture, *, changed: bool) -> CaptionStats:
    """Return the statistics of one row, whose picture was captioned or has an error."""
    if result.caption is None or result.mean_logprob is None:
        stats = CaptionStats(errors=1)
    else:
        stats = CaptionStats.from_caption(result.caption, result.mean_logprob)
    pixels = {} if picture.pixels is None else {"pictures": 1, **pixel_stats(picture.pixels)._asdict()}
    return stats.model_copy(update={"changed": int(changed), **pixels})


def _write_file(job: CaptionJob, rows: list[dict[str, Any]]) -> None:
    """Write a caption file atomically."""
    with atomic_write(job.output_folder / f"{uuid.uuid4().hex}.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(rows, PENDING_SCHEMA), temporary)

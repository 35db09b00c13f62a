"""Writing of shard files. The shard files of a folder have the rows of one split of a source, in shuffled order.

Ranks read the shard files. Spark shuffles each picture to the task that writes the picture's shard file. Executors
decode and resize the pictures, and then write the shard files. `_decode_after_shuffle` decides whether the pictures are
decoded before or after the shuffle. The driver writes the manifest last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from pyarrow import RecordBatch
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from pipelines.driver.delta.settings import bounded_batches
from pipelines.driver.delta.spark_errors import filter_rows, run_or_guard
from pipelines.errors import StageFailed, UserError
from pipelines.executor.shard import (
    SHUFFLED,
    WRITTEN,
    assign_files,
    assign_files_and_decode,
    assign_files_and_decode_guarded,
    write_files,
)
from pipelines.executor.texts.shard import write_text_files
from pipelines.formats.shards import MANIFEST, Manifest, ShardFile, ShardRequest, write_manifest
from pipelines.platform import default_parallelism

STALE_SECONDS = 3600
"""Leftover files of at least this age, in seconds, are removed, because their writers have crashed."""
SAMPLED_ROWS = 64
"""Number of pictures that are measured. Their mean size decides whether pictures are decoded before or after the
shuffle."""

Assign = Callable[..., Iterator[RecordBatch]]
"""Function that assigns rows to shard files, as `executor.shard.assign_files` does. The function may also decode
pictures.
"""


def rows_of_split(spark: SparkSession, request: ShardRequest, version: int) -> DataFrame:
    """Return the rows of one split of a source that meet the SQL condition of the request.

    The pictures in `request.left_out` are left out.

    Raises:
        UserError: no row is left, or the condition is not valid SQL.
    """
    samples = spark.read.option("versionAsOf", version).table(request.table).filter(F.col("source") == request.source)
    samples = filter_rows(samples, request.where, where="data.shards.where")
    rows = samples.filter(F.col("split") == request.split)
    if request.left_out:
        left_out = spark.createDataFrame([(image_id,) for image_id in request.left_out], "image_id string")
        rows = rows.join(left_out, "image_id", "left_anti")
    if rows.isEmpty():
        counts = samples.groupBy("split").count().orderBy("split").collect()
        found = {row["split"]: row["count"] for row in counts}
        raise no_rows(request.table, request.source, request.split, request.where, found, len(request.left_out))
    return rows


def _shuffle_key(request: ShardRequest, column: str) -> Column:
    return F.sha2(F.concat(F.lit(f"{request.seed}/"), column), 256).alias("shuffle_key")


def select_rows(spark: SparkSession, request: ShardRequest, version: int) -> DataFrame:
    """Select the pictures of one split of a source, with their texts and shuffle keys."""
    return rows_of_split(spark, request, version).select(
        "image_id",
        "image",
        F.sort_array("texts").alias("texts"),  # sorted, so that shards do not depend on the order of the source's rows
        _shuffle_key(request, "image_id"),
    )


def no_rows(  # noqa: PLR0917 (each argument is one part of the message)
    table: str, source: str, split: str, where: str, counts: Mapping[str, int], left_out: int = 0
) -> UserError:
    """Return the error for a split without rows. `counts` maps each split that has rows to the number of rows."""
    selection = " that meet data.shards.where" if where else " of this source"
    found = ", ".join(f"{count} in {each}" for each, count in counts.items()) or f"no rows{selection} at all"
    return UserError(
        f"the {split} split has no rows",
        where=f"{table}, source {source}",
        got=f"{found}; {left_out} are left out of the mix as copies" if left_out else found,
        fix="run `lakesight ingest` first, or change data.split, data.shards.where, data.validate_on or "
        "data.evaluate_on",
    )


def write_folder(rows: DataFrame, folder: Path, request: ShardRequest, seconds: float) -> None:
    """Write all shard files, then the manifest. Decoding a picture may take at most `seconds` seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    # A single task numbers the shuffle keys. The task needs little memory, because a key has only 64 characters and the
    # task reads no pictures. Each picture goes directly to its shard file, because the driver knows the first shuffle
    # key of each file.
    numbered = rows.select("shuffle_key", (F.row_number().over(Window.orderBy("shuffle_key")) - 1).alias("number"))
    starts = numbered.filter(F.col("number") % request.rows == 0).orderBy("number").collect()
    first_keys = [row["shuffle_key"] for row in starts]
    late = _decode_after_shuffle(rows, request, len(first_keys))
    write = partial(_write_files, rows, folder, request, first_keys, seconds=seconds)
    files = run_or_guard(
        partial(write, assign_files if late else partial(assign_files_and_decode, seconds=seconds)),
        partial(write, partial(assign_files_and_decode_guarded, seconds=seconds)),
    )
    manifest = Manifest(request=request, files=tuple(files))
    _finish_folder(folder, manifest, rows.count())


def _finish_folder(folder: Path, manifest: Manifest, expected: int) -> None:
    """Check the number of rows, remove leftover files, and write the manifest.

    Raises:
        StageFailed: the files do not hold the expected number of rows.
    """
    files, size = manifest.files, manifest.request.rows
    if manifest.num_rows != expected or any(file.rows != size for file in files[:-1]):
        raise StageFailed(
            "the shards do not contain exactly the selected rows of the table",
            where=str(folder),
            got=f"{manifest.num_rows} rows in {len(files)} files, expected {expected}, {size} per file",
            fix="this is a defect of Lakesight: please report it",
        )
    _remove_leftovers(folder, {file.file for file in files})
    write_manifest(folder, manifest)


def _decode_after_shuffle(rows: DataFrame, request: ShardRequest, files: int) -> bool:
    """Return whether to shuffle encoded pictures and decode them after the shuffle.

    With another encoding than `raw`, pictures are always decoded before the shuffle. With `raw`, decoding after the
    shuffle is faster if encoded pictures are smaller than their pixels, and if there are at least as many shard files
    as cores, so that all cores decode.
    """
    assert request.image is not None
    if request.encoding != "raw" or files < default_parallelism(rows.sparkSession):
        return False
    sample = rows.select(F.octet_length("image").alias("bytes")).limit(SAMPLED_ROWS).collect()
    return bool(sum(row["bytes"] for row in sample) < len(sample) * 3 * request.image.size**2)


def _write_files(
    rows: DataFrame, folder: Path, request: ShardRequest, first_keys: list[str], assign: Assign, *, seconds: float
) -> list[ShardFile]:
    """Send every picture to the task that writes its shard file, and write the shard files. Return the files sorted by
    name.
    """
    assigned = partial(assign, request=request, first_keys=first_keys)
    decoded = assign is not assign_files
    write = partial(write_files, request=request, folder=str(folder), decoded=decoded, seconds=seconds)
    with bounded_batches(rows.sparkSession):
        written = (
            rows.select("image_id", "image", "texts")
            .mapInArrow(assigned, from_arrow_schema(SHUFFLED))
            .repartition(len(first_keys), "file")
            .sortWithinPartitions("file", "shuffle_key")
            .mapInArrow(write, from_arrow_schema(WRITTEN))
            .collect()
        )
    return sorted((ShardFile(**row.asDict()) for row in written), key=lambda file: file.file)


def _remove_leftovers(folder: Path, keep: set[str]) -> None:
    """Remove files of crashed writers. Files younger than an hour may belong to a concurrent writer and are kept."""
    for path in folder.iterdir():
        if path.name not in keep and path.name != MANIFEST and time.time() - path.stat().st_mtime > STALE_SECONDS:
            path.unlink(missing_ok=True)


def write_texts(rows: DataFrame, folder: Path, request: ShardRequest) -> None:
    """Write the shard files of texts, then the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = rows.select("text_id", "text", _shuffle_key(request, "text_id"))
    # A single task numbers the shuffle keys. The task needs little memory, because a key has only 64 characters and the
    # task reads no texts.
    number = F.row_number().over(Window.orderBy("shuffle_key")) - 1
    files_of = rows.select("text_id", F.floor(number / request.rows).cast("int").alias("file"))
    expected = rows.count()
    with bounded_batches(rows.sparkSession):
        written = (
            rows.join(files_of, "text_id")
            .repartition(-(-expected // request.rows), "file")
            .sortWithinPartitions("file", "shuffle_key")
            .select("file", "text_id", "text")
            .mapInArrow(partial(write_text_files, request=request, folder=str(folder)), from_arrow_schema(WRITTEN))
            .collect()
        )
    files = sorted((ShardFile(**row.asDict()) for row in written), key=lambda file: file.file)
    _finish_folder(folder, Manifest(request=request, files=tuple(files)), expected)

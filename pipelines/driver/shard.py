"""Shard stage: write the rows of one source and split, at a pinned version of `samples`, to files that ranks read.

Spark shuffles each picture to the task that writes the picture's shard file. Executors decode and resize the pictures,
either before or after the shuffle (`_decode_after_shuffle`), and then write the shard files. The driver writes the
manifest last. The request determines the contents of a shard folder, and the folder's name is a hash of the request, so
the same request finds the folder again. Two processes may write the same folder at the same time, because both write
the same bytes under the same names, and write each file atomically.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pyarrow import RecordBatch
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from pipelines.config import DataConfig, Split, short_hash
from pipelines.driver.delta.on_disk import count_on_disk, has_rows
from pipelines.driver.delta.settings import bounded_batches
from pipelines.driver.delta.spark_errors import filter_rows, run_or_guard, translate_spark_errors
from pipelines.driver.delta.tables import ensure_tables, open_tables, table_id
from pipelines.driver.delta.versions import TableVersions, read_versions, read_versions_of_files
from pipelines.errors import StageFailed, UserError
from pipelines.executor.shard import (
    SHUFFLED,
    WRITTEN,
    assign_files,
    assign_files_and_decode,
    assign_files_and_decode_guarded,
    write_files,
)
from pipelines.formats.shards import MANIFEST, Manifest, MixPart, ShardFile, ShardRequest, Shards, write_manifest
from pipelines.formats.tables import SAMPLES
from pipelines.platform import Platform, default_parallelism
from vlm.config import Config, ImageConfig

logger = logging.getLogger(__name__)

STALE_SECONDS = 3600
"""Age in seconds at which a leftover file of a crashed writer is removed."""
SAMPLED_ROWS = 64
"""Number of pictures whose mean size decides whether to decode pictures before or after the shuffle."""

TIME_FACTOR = 2
"""Longest time to decode a picture in this stage, as a multiple of the longest time in an ingest.

The ingest has decoded every picture within its time limit, but perhaps on a faster machine."""

Assign = Callable[..., Iterator[RecordBatch]]
"""Function with the interface of `executor.shard.assign_files`, which may also decode the pictures."""


class ShardReport(Config):
    """Report on a complete shard folder.

    Attributes:
        folder: path of the folder.
        source: name of the source, which is the name of its data config.
        split: split of the rows: train, val or test.
        num_rows: number of pictures.
        content_hash: hash of the contents; equal training data has an equal hash.
        dataset_version: version of `samples` that last changed this source.
        reused: whether the folder existed already and nothing was written.
        seconds: duration of the stage, in seconds.
    """

    folder: str
    source: str
    split: Split
    num_rows: int
    content_hash: str
    dataset_version: int
    reused: bool
    seconds: float


class ShardFolder(NamedTuple):
    """A complete shard folder. `reused` says whether the folder existed before."""

    folder: Path
    manifest: Manifest
    reused: bool


def shard(  # noqa: PLR0917 (each argument is one part of a run, and all are required)
    spark: SparkSession, platform: Platform, source_name: str, config: DataConfig, image: ImageConfig, split: Split
) -> ShardReport:
    """Find or write the shards of one source and split, and for a training mix the shards of the other sources too.

    A shard request names the version of `samples` that last changed the source. The rows are read at the newest
    version, because VACUUM may have removed the files of the pinned version. The rows of the source are the same in
    both versions.

    Raises:
        UserError: the split has no rows, or data.shards.where is not a valid SQL condition.
        StageFailed: rows were lost or written twice.
    """
    started = time.monotonic()
    ensure_tables(spark, platform)
    parts = [
        find_or_write(spark, platform, name, config, image, split) for name in _sources(source_name, config, split)
    ]
    return _report(platform, source_name, config, split, parts, started)


def find_finished(
    platform: Platform, source_name: str, config: DataConfig, image: ImageConfig, split: Split
) -> ShardReport | None:
    """Find the shards of one source and split without Spark, or return None if the shards are not written yet.

    The arguments are those of `shard`. If a catalog manages the tables, the result is always None.

    Raises:
        UserError: the split has no rows. Spark would find the same result, but takes several seconds to start.
    """
    started = time.monotonic()
    tables = open_tables(platform, SAMPLES)
    if tables is None:
        if platform.tables and not (platform.tables / SAMPLES.name).exists():
            raise _no_rows(platform.table(SAMPLES.name), source_name, split, config.shards.where, {})
        return None
    samples, parts = tables[SAMPLES.name], []
    for name in _sources(source_name, config, split):
        pin = read_versions_of_files(samples, name), str(samples.metadata().id)
        request = _request(platform, name, config, image, split, pin)
        folder = platform.folder("shards") / request.folder_name
        if not (folder / MANIFEST).exists():
            if not has_rows(samples, {"source": name, "split": split}):
                counts = count_on_disk(samples, {"source": name}, "split")
                raise _no_rows(request.table, name, split, request.where, counts)
            return None
        parts.append(ShardFolder(folder, Shards.open(folder).manifest, reused=True))
    return _report(platform, source_name, config, split, parts, started)


def _sources(source_name: str, config: DataConfig, split: Split) -> list[str]:
    """Return the sources whose rows the shards hold; training shards also hold rows of the sources in `mix`."""
    return [source_name, *(config.mix if split == "train" else ())]


def _report(  # noqa: PLR0917 (each argument is one part of a report)
    platform: Platform, source_name: str, config: DataConfig, split: Split, parts: list[ShardFolder], started: float
) -> ShardReport:
    found = parts[0]
    if len(parts) > 1:
        found = write_mix(parts, list(config.mix.values()), platform.folder("shards"))
    manifest = found.manifest
    how = "found" if found.reused else "new"
    logger.debug("%s %s: %d rows in %s (%s)", source_name, split, manifest.num_rows, found.folder, how)
    return ShardReport(
        folder=str(found.folder),
        source=source_name,
        split=split,
        num_rows=manifest.num_rows,
        content_hash=manifest.content_hash,
        dataset_version=manifest.request.table_version,
        reused=found.reused,
        seconds=round(time.monotonic() - started, 3),
    )


def write_mix(parts: Sequence[ShardFolder], shares: Sequence[float], shards: Path) -> ShardFolder:
    """Write a folder that contains only a manifest, which refers to the files of other shard folders.

    The manifest says how many rows of each part an epoch draws. The number of draws in an epoch is the number of rows
    of all parts together. Each part except the first part gets its share of the draws. The first part gets all
    remaining draws.

    Args:
        parts: shard folders to mix, which have the same parent folder.
        shares: shares of all parts after the first part. Each share is above 0, and their sum is below 1.
        shards: parent folder of the shard folders.
    """
    total = sum(part.manifest.num_rows for part in parts)
    shared_draws = [max(1, round(share * total)) for share in shares]
    draws = [max(1, total - sum(shared_draws)), *shared_draws]
    manifest = Manifest(
        request=parts[0].manifest.request,
        files=tuple(
            file.model_copy(update={"file": f"../{part.folder.name}/{file.file}"})
            for part in parts
            for file in part.manifest.files
        ),
        parts=tuple(
            MixPart(source=part.manifest.request.source, rows=part.manifest.num_rows, draws=number)
            for part, number in zip(parts, draws, strict=True)
        ),
    )
    names = [part.folder.name for part in parts]
    folder = shards / f"{manifest.request.source}-mix-{short_hash(manifest.format, names, draws)}"
    reused = (folder / MANIFEST).exists()
    if not reused:
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder, manifest)
    return ShardFolder(folder, Shards.open(folder).manifest, reused)


def find_or_write(  # noqa: PLR0917 (as for `shard`)
    spark: SparkSession, platform: Platform, source: str, config: DataConfig, image: ImageConfig, split: Split
) -> ShardFolder:
    """Return the shard folder of a source and split, as of the source's last change. Write the folder if missing."""
    version = read_versions(spark, platform, source)
    request = _request(platform, source, config, image, split, (version, table_id(spark, platform, SAMPLES)))
    folder = platform.folder("shards") / request.folder_name
    reused = (folder / MANIFEST).exists()
    if not reused:
        with translate_spark_errors("the shards could not be written", where=str(folder)):
            seconds = TIME_FACTOR * config.limits.max_decode_seconds
            _write_folder(_select_rows(spark, request, version.newest), folder, request, seconds)
    return ShardFolder(folder, Shards.open(folder).manifest, reused)


def _request(  # noqa: PLR0917 (as for `shard`)
    platform: Platform,
    source: str,
    config: DataConfig,
    image: ImageConfig,
    split: Split,
    pin: tuple[TableVersions, str],
) -> ShardRequest:
    """Return the shard request for a source and split. `pin` has the versions and the id of table `samples`."""
    shards, (version, samples_id) = config.shards, pin
    return ShardRequest(
        table=platform.table(SAMPLES.name),
        table_id=samples_id,
        table_version=version.last_change,
        source=source,
        split=split,
        image=image,
        encoding=shards.encoding,
        rows=shards.rows,
        seed=shards.seed,
        where=shards.where,
        draft=shards.draft,
        text_weights=config.text_weights,
    )


def _select_rows(spark: SparkSession, request: ShardRequest, version: int) -> DataFrame:
    """Select the rows of a source and split that meet the condition, with their shuffle keys."""
    samples = spark.read.option("versionAsOf", version).table(request.table).filter(F.col("source") == request.source)
    samples = filter_rows(samples, request.where, where="data.shards.where")
    rows = samples.filter(F.col("split") == request.split)
    if rows.isEmpty():
        counts = samples.groupBy("split").count().orderBy("split").collect()
        found = {row["split"]: row["count"] for row in counts}
        raise _no_rows(request.table, request.source, request.split, request.where, found)
    return rows.select(
        "image_id",
        "image",
        F.sort_array("texts").alias("texts"),  # sorted, so that shards do not depend on the order of the source's rows
        F.sha2(F.concat(F.lit(f"{request.seed}/"), "image_id"), 256).alias("shuffle_key"),
    )


def _no_rows(table: str, source: str, split: str, where: str, counts: Mapping[str, int]) -> UserError:
    """Return the error for a split without rows. `counts` has the number of selected rows of each split with rows."""
    selection = " that meet data.shards.where" if where else " of this source"
    return UserError(
        f"the {split} split has no rows",
        where=f"{table}, source {source}",
        got=", ".join(f"{count} in {each}" for each, count in counts.items()) or f"no rows{selection} at all",
        fix="run `lakesight ingest` first, or change data.split, data.shards.where, data.validate_on or "
        "data.evaluate_on",
    )


def _write_folder(rows: DataFrame, folder: Path, request: ShardRequest, seconds: float) -> None:
    """Write all shard files, then the manifest. Decoding a picture may take at most `seconds` seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    # A single task numbers the shuffle keys, which have 64 characters per picture. Pictures do not pass through this
    # task. Each picture goes directly to its shard file, because the driver knows the first shuffle key of each file.
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
    expected = rows.count()
    if manifest.num_rows != expected or any(file.rows != request.rows for file in files[:-1]):
        raise StageFailed(
            "the shards do not contain exactly the selected rows of the table",
            where=str(folder),
            got=f"{manifest.num_rows} rows in {len(files)} files, expected {expected}, {request.rows} per file",
            fix="this is a defect of Lakesight: please report it",
        )
    _remove_leftovers(folder, {file.file for file in files})
    write_manifest(folder, manifest)


def _decode_after_shuffle(rows: DataFrame, request: ShardRequest, files: int) -> bool:
    """Return whether to shuffle encoded pictures and decode them after the shuffle.

    Decoding after the shuffle is faster if encoded pictures are smaller than their pixels, and if there are at least as
    many shard files as cores, so that all cores decode.
    """
    if request.encoding != "raw" or files < default_parallelism(rows.sparkSession):
        return False
    sample = rows.select(F.octet_length("image").alias("bytes")).limit(SAMPLED_ROWS).collect()
    return bool(sum(row["bytes"] for row in sample) < len(sample) * 3 * request.image.size**2)


def _write_files(
    rows: DataFrame, folder: Path, request: ShardRequest, first_keys: list[str], assign: Assign, *, seconds: float
) -> list[ShardFile]:
    """Shuffle every picture to its shard file and write the shard files. Return the files sorted by name."""
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

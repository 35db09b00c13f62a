"""Shard: the rows of one source and split, at a pinned version of `samples`, as files that ranks read.

Executors decode and resize, Spark's shuffle brings every picture to its file, before that or after, executors write the
files, and the driver writes the manifest, last. What a folder holds is determined by its request, and its name is the
request's hash: the same request finds it again. Two writers of one folder do no harm, because they write the same bytes
under the same names, each whole.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pyarrow import RecordBatch
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from pipelines.config import DataConfig, ShardConfig, Split, short_hash
from pipelines.driver.delta.failures import filtered, spark_failures, worker_died
from pipelines.driver.delta.settings import bounded_batches
from pipelines.driver.delta.tables import ensure_tables, table_id
from pipelines.driver.delta.versions import versions
from pipelines.errors import StageFailed, UserError
from pipelines.executor.shard import PLACED, WRITTEN, pictures_of, pixels_guarded, pixels_of, write_files
from pipelines.formats.shards import MANIFEST, Manifest, Part, ShardFile, ShardRequest, Shards, write_manifest
from pipelines.formats.tables import SAMPLES
from pipelines.platform import Platform
from vlm.config import Config, ImageConfig

logger = logging.getLogger(__name__)

STALE_SECONDS = 3600

SAMPLED_ROWS = 64
"""Pictures whose size says whether pictures or pixels travel."""

Place = Callable[..., Iterator[RecordBatch]]


class ShardReport(Config):
    """A shard folder that is complete.

    Attributes:
        folder: where it is.
        source: name of the data config.
        split: the split it holds.
        num_rows: pictures.
        content_hash: equal for equal training data.
        dataset_version: the version of `samples` that last changed this source.
        reused: True when the folder was there and nothing was written.
        seconds: how long it took.
    """

    folder: str
    source: str
    split: Split
    num_rows: int
    content_hash: str
    dataset_version: int
    reused: bool
    seconds: float


class Packed(NamedTuple):
    """A complete shard folder, and whether it was there."""

    folder: Path
    manifest: Manifest
    reused: bool


def shard(  # noqa: PLR0917 (each argument is one slice of a run, and none may be left out)
    spark: SparkSession, platform: Platform, source_name: str, config: DataConfig, image: ImageConfig, split: Split
) -> ShardReport:
    """Write the training shards of one source and split, or find them; of a mix, those of every source to learn from.

    A request is pinned to the version that last changed its source (`session.versions`); the rows are read at the
    newest version, where they are the same, because an old version's files may have been vacuumed away.

    Raises:
        UserError: the split has no rows, or data.shards.where is no condition. StageFailed: rows were lost or doubled
            on the way.
    """
    started = time.monotonic()
    ensure_tables(spark, platform)
    packed = _packed(spark, platform, source_name, config.shards, image, split)
    if split == "train" and config.mix:
        others = [_packed(spark, platform, other, config.shards, image, split) for other in config.mix]
        packed = mix([packed, *others], list(config.mix.values()), platform.folder("shards"))
    manifest = packed.manifest
    how = "found" if packed.reused else "new"
    logger.info("%s %s: %d rows in %s (%s)", source_name, split, manifest.num_rows, packed.folder, how)
    return ShardReport(
        folder=str(packed.folder),
        source=source_name,
        split=split,
        num_rows=manifest.num_rows,
        content_hash=manifest.content_hash,
        dataset_version=manifest.request.table_version,
        reused=packed.reused,
        seconds=round(time.monotonic() - started, 3),
    )


def mix(parts: Sequence[Packed], shares: Sequence[float], shards: Path) -> Packed:
    """A folder that names the files of others and how often rows of each are drawn; it holds a manifest alone.

    An epoch has as many draws as there are rows in all: of part 1 and later by their shares, of part 0 what is left.

    Args:
        parts: folders beside each other.
        shares: of part 1 and later, each above 0, together below 1.
        shards: the folder that they are in.
    """
    total = sum(part.manifest.num_rows for part in parts)
    given = [max(1, round(share * total)) for share in shares]
    draws = [max(1, total - sum(given)), *given]
    manifest = Manifest(
        request=parts[0].manifest.request,
        files=tuple(
            file.model_copy(update={"file": f"../{part.folder.name}/{file.file}"})
            for part in parts
            for file in part.manifest.files
        ),
        parts=tuple(
            Part(source=part.manifest.request.source, rows=part.manifest.num_rows, draws=number)
            for part, number in zip(parts, draws, strict=True)
        ),
    )
    names = [part.folder.name for part in parts]
    folder = shards / f"{manifest.request.source}-mix-{short_hash(manifest.format, names, draws)}"
    reused = (folder / MANIFEST).exists()
    if not reused:
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder, manifest)
    return Packed(folder, Shards.open(folder).manifest, reused)


def _packed(  # noqa: PLR0917
    spark: SparkSession, platform: Platform, source: str, config: ShardConfig, image: ImageConfig, split: Split
) -> Packed:
    version = versions(spark, platform, source)
    request = ShardRequest(
        table=platform.table(SAMPLES.name),
        table_id=table_id(spark, platform, SAMPLES),
        table_version=version.changed,
        source=source,
        split=split,
        image=image,
        encoding=config.encoding,
        rows=config.rows,
        seed=config.seed,
        where=config.where,
        draft=config.draft,
    )
    folder = platform.folder("shards") / request.folder_name
    reused = (folder / MANIFEST).exists()
    if not reused:
        with spark_failures("the shards could not be written", where=str(folder)):
            _write(_rows(spark, request, version.newest), folder, request)
    return Packed(folder, Shards.open(folder).manifest, reused)


def _rows(spark: SparkSession, request: ShardRequest, version: int) -> DataFrame:
    """The rows of a source and split that meet the condition, with the place of each in the shuffled order."""
    samples = spark.read.option("versionAsOf", version).table(request.table).filter(F.col("source") == request.source)
    samples = filtered(samples, request.where, where="data.shards.where")
    rows = samples.filter(F.col("split") == request.split)
    if rows.isEmpty():
        counts = samples.groupBy("split").count().orderBy("split").collect()
        meeting = " that meet data.shards.where" if request.where else " of this source"
        raise UserError(
            f"the {request.split} split has no rows",
            where=f"{request.table}, source {request.source}",
            got=", ".join(f"{row['count']} in {row['split']}" for row in counts) or f"no rows{meeting} at all",
            fix="run `lakesight ingest` first, or change data.split, data.shards.where, data.validate_on or "
            "data.evaluate_on",
        )
    return rows.select(
        "image_id",
        "image",
        "texts",
        F.sha2(F.concat(F.lit(f"{request.seed}/"), "image_id"), 256).alias("place"),
    )


def _write(rows: DataFrame, folder: Path, request: ShardRequest) -> None:
    """Write every file, then the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    # Places alone go through one task, to number them: a 64-character string a picture. Pictures go straight to
    # their files, because the driver knows at which place each file begins.
    numbered = rows.select("place", (F.row_number().over(Window.orderBy("place")) - 1).alias("number"))
    starts = numbered.filter(F.col("number") % request.rows == 0).orderBy("number").collect()
    firsts = [row["place"] for row in starts]
    pack = partial(_pack, rows, folder, request, firsts)
    try:
        found = pack(pictures_of) if _pictures_are_smaller(rows, request, len(firsts)) else pack(pixels_of)
    except Exception as error:
        if not worker_died(error):
            raise
        logger.warning("a Python worker died while it decoded: pictures are decoded again in guarded processes")
        found = pack(pixels_guarded)
    manifest = Manifest(request=request, files=tuple(found))
    expected = rows.count()
    if manifest.num_rows != expected or any(file.rows != request.rows for file in found[:-1]):
        raise StageFailed(
            "the shards do not hold the rows of the table",
            where=str(folder),
            got=f"{manifest.num_rows} rows in {len(found)} files, expected {expected}, {request.rows} a file",
            fix="this is a defect of Lakesight: please report it",
        )
    _remove_leftovers(folder, {file.file for file in found})
    write_manifest(folder, manifest)


def _pictures_are_smaller(rows: DataFrame, request: ShardRequest, files: int) -> bool:
    """Whether to decode behind the shuffle: where pictures are smaller than their pixels, and a core has a file."""
    if request.encoding != "raw" or files < rows.sparkSession.sparkContext.defaultParallelism:
        return False
    some = rows.select(F.octet_length("image").alias("bytes")).limit(SAMPLED_ROWS).collect()
    return bool(sum(row["bytes"] for row in some) < len(some) * 3 * request.image.size**2)


def _pack(rows: DataFrame, folder: Path, request: ShardRequest, firsts: list[str], place: Place) -> list[ShardFile]:
    """Bring every picture to its file, and write the files; in the order of their names."""
    placed = partial(place, request=request, firsts=firsts)
    files = partial(write_files, request=request, folder=str(folder), decoded=place is not pictures_of)
    with bounded_batches(rows.sparkSession):
        written = (
            rows.select("image_id", "image", "texts")
            .mapInArrow(placed, from_arrow_schema(PLACED))
            .repartition(len(firsts), "file")
            .sortWithinPartitions("file", "place")
            .mapInArrow(files, from_arrow_schema(WRITTEN))
            .collect()
        )
    return sorted((ShardFile(**row.asDict()) for row in written), key=lambda file: file.file)


def _remove_leftovers(folder: Path, keep: set[str]) -> None:
    """Remove what a crash left behind. Files touched within the hour may be another writer's, at work just now."""
    for path in folder.iterdir():
        if path.name not in keep and path.name != MANIFEST and time.time() - path.stat().st_mtime > STALE_SECONDS:
            path.unlink(missing_ok=True)

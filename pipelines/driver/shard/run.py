"""Shard stage: find or write the shards of one source and split, at a pinned version of the table of their rows.

The request determines the contents of a shard folder, and the folder's name is a hash of the request, so the same
request finds the folder again. Two processes may write the same folder at the same time, because both write the same
bytes under the same names, and write each file atomically (`write.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pyspark.sql import SparkSession

from pipelines.config import DataConfig, Split, short_hash
from pipelines.driver.delta.on_disk import count_on_disk, has_rows
from pipelines.driver.delta.spark_errors import translate_spark_errors
from pipelines.driver.delta.tables import ensure_tables, open_tables, table_id
from pipelines.driver.delta.versions import TableVersions, read_versions, read_versions_of_files
from pipelines.driver.shard.write import no_rows, rows_of_split, select_rows, write_folder, write_texts
from pipelines.formats.shards import MANIFEST, Manifest, MixPart, ShardRequest, Shards, write_manifest
from pipelines.formats.tables import SAMPLES, TEXTS
from pipelines.platform import Platform
from vlm.config import Config, ImageConfig

logger = logging.getLogger(__name__)

TIME_FACTOR = 2
"""Longest time to decode a picture in this stage, as a multiple of the longest time in an ingest.

The ingest has decoded every picture within its time limit, but perhaps on a faster machine."""


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


def shard_texts(
    spark: SparkSession, platform: Platform, source_name: str, config: DataConfig, split: Split
) -> ShardReport:
    """Find or write the shards of the texts of one source of kind `text` and split, as `shard` does for pictures.

    Raises:
        UserError: the split has no texts, or data.shards.where is not a valid SQL condition.
        StageFailed: texts were lost or written twice.
    """
    started = time.monotonic()
    ensure_tables(spark, platform)
    version = read_versions(spark, platform, source_name, TEXTS)
    request = _request(platform, source_name, config, None, split, (version, table_id(spark, platform, TEXTS)))
    folder = platform.folder("shards") / request.folder_name
    reused = (folder / MANIFEST).exists()
    if not reused:
        with translate_spark_errors("the shards could not be written", where=str(folder)):
            write_texts(rows_of_split(spark, request, version.newest), folder, request)
    part = ShardFolder(folder, Shards.open(folder).manifest, reused)
    return _report(platform, source_name, config, split, [part], started)


def find_finished(
    platform: Platform, source_name: str, config: DataConfig, image: ImageConfig | None, split: Split
) -> ShardReport | None:
    """Find the shards of one source and split without Spark, or return None if the shards are not written yet.

    The arguments are those of `shard`; shards of text have no `image`. If a catalog manages the tables, the result is
    always None.

    Raises:
        UserError: the split has no rows. Spark would find the same result, but takes several seconds to start.
    """
    started = time.monotonic()
    table = SAMPLES if image else TEXTS
    tables = open_tables(platform, table)
    if tables is None:
        if platform.tables and not (platform.tables / table.name).exists():
            raise no_rows(platform.table(table.name), source_name, split, config.shards.where, {})
        return None
    rows, parts = tables[table.name], []
    for name in _sources(source_name, config, split):
        pin = read_versions_of_files(rows, name), str(rows.metadata().id)
        request = _request(platform, name, config, image, split, pin)
        folder = platform.folder("shards") / request.folder_name
        if not (folder / MANIFEST).exists():
            if not has_rows(rows, {"source": name, "split": split}):
                counts = count_on_disk(rows, {"source": name}, "split")
                raise no_rows(request.table, name, split, request.where, counts)
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
            write_folder(select_rows(spark, request, version.newest), folder, request, seconds)
    return ShardFolder(folder, Shards.open(folder).manifest, reused)


def _request(  # noqa: PLR0917 (as for `shard`)
    platform: Platform,
    source: str,
    config: DataConfig,
    image: ImageConfig | None,
    split: Split,
    pin: tuple[TableVersions, str],
) -> ShardRequest:
    """Return the shard request for a source and split. `pin` has the versions and the id of the table of the rows."""
    shards, (version, pinned_id) = config.shards, pin
    return ShardRequest(
        table=platform.table((SAMPLES if image else TEXTS).name),
        table_id=pinned_id,
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

"""Shard stage: find or write the shards of one split of a source, at a pinned version of table `samples` or `texts`.

A shard request determines the contents of a shard folder. The folder's name contains a hash of the request, so the same
request finds the folder again. Two processes may write the same folder at the same time, because both write the same
bytes under the same names, and write each file atomically (`write.py`).
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Sequence

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from pipelines.config import DataConfig, Split
from pipelines.driver.delta.near_pairs import copies_across_sources
from pipelines.driver.delta.on_disk import count_on_disk, has_rows
from pipelines.driver.delta.spark_errors import translate_spark_errors
from pipelines.driver.delta.tables import ensure_tables, open_tables, table_id
from pipelines.driver.delta.versions import TableVersions, read_versions, read_versions_of_files
from pipelines.driver.shard.write import no_rows, rows_of_split, select_rows, write_folder, write_texts
from pipelines.formats.mixes import MixCopies, ShardFolder, copies_file, find_parts, known_copies, write_mix
from pipelines.formats.run_folder import write_json
from pipelines.formats.shards import MANIFEST, ShardRequest, Shards
from pipelines.formats.tables import SAMPLES, TEXTS
from pipelines.platform import Platform
from vlm.config import Config, ImageConfig

logger = logging.getLogger(__name__)

SHOWN_PICTURES = 5
"""Largest number of copied pictures that a log message lists for one source."""
TIME_FACTOR = 2
"""Time limit for decoding a picture in the shard stage, as a multiple of the time limit in an ingest.

The time limit of the shard stage is longer, because the ingest may have decoded the pictures on a faster machine."""


class ShardReport(Config):
    """Report on a complete shard folder.

    Attributes:
        folder: path of the folder.
        source: name of the source, which is the name of its data config.
        split: split of the rows: train, val or test.
        num_rows: number of pictures or texts.
        content_hash: hash of the contents; equal training data has an equal hash.
        dataset_version: version of `samples` or `texts` that last changed this source.
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


def shard(  # noqa: PLR0917 (each argument is one part of a run, and all are required)
    spark: SparkSession, platform: Platform, source_name: str, config: DataConfig, image: ImageConfig, split: Split
) -> ShardReport:
    """Find or write the shards of one split of a source.

    If the run trains on a mix of sources, training shards of the other sources are found or written too.

    A shard request contains the version of `samples` that last changed the source. The rows are read at the newest
    version, because VACUUM may have removed the files of the pinned version. The rows of the source are equal in the
    pinned version and in the newest version.

    If a training picture of a mix copies a validation or test picture of another source of the mix, the picture is left
    out.

    Raises:
        UserError: the split has no rows, or data.shards.where is not a valid SQL condition.
        StageFailed: Spark failed, or rows were lost or written twice.
    """
    started = time.monotonic()
    ensure_tables(spark, platform)
    pinned_id = table_id(spark, platform, SAMPLES)
    requests, newest = [], []
    for name in _sources(source_name, config, split):
        version = read_versions(spark, platform, name)
        newest.append(version.newest)
        requests.append(_request(platform, name, config, image, split, (version, pinned_id)))
    if len(requests) > 1:
        copies = known_copies(platform.folder("shards"), requests, list(config.mix.values()))
        if copies is None:
            copies = _compare_sources(spark, platform, requests, max(newest))
        requests = copies.leave_out(requests)
    parts = [
        _find_or_write(spark, platform, request, version, config)
        for request, version in zip(requests, newest, strict=True)
    ]
    return _report(platform, source_name, config, split, parts, started)


def shard_texts(
    spark: SparkSession, platform: Platform, source_name: str, config: DataConfig, split: Split
) -> ShardReport:
    """Find or write the text shards of one split of a source of kind `text`, as `shard` does for pictures.

    Raises:
        UserError: the split has no texts, or data.shards.where is not a valid SQL condition.
        StageFailed: Spark failed, or texts were lost or written twice.
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
    """Without Spark, find the shards of one split of a source. Return None if the shards are not written yet.

    The arguments are those of `shard`, without the Spark session. `shard` finds the same shards, but needs Spark, which
    takes several seconds to start. For shards of text, `image` is None. If a catalog manages the tables, the result is
    always None.

    Raises:
        UserError: the split has no rows.
    """
    started = time.monotonic()
    table, shards = SAMPLES if image else TEXTS, platform.folder("shards")
    tables = open_tables(platform, table)
    if tables is None:
        if platform.tables and not (platform.tables / table.name).exists():
            raise no_rows(platform.table(table.name), source_name, split, config.shards.where, {})
        return None
    rows, requests = tables[table.name], []
    for name in _sources(source_name, config, split):
        pin = read_versions_of_files(rows, name), str(rows.metadata().id)
        request = _request(platform, name, config, image, split, pin)
        written = (shards / request.folder_name / MANIFEST).exists()
        if not written and not has_rows(rows, {"source": name, "split": split}):
            counts = count_on_disk(rows, {"source": name}, "split")
            raise no_rows(request.table, name, split, request.where, counts)
        requests.append(request)
    if len(requests) > 1:
        copies = known_copies(shards, requests, list(config.mix.values()))
        if copies is None:
            return None
        requests = copies.leave_out(requests)
    parts = find_parts(shards, requests)
    return _report(platform, source_name, config, split, parts, started) if parts else None


def _sources(source_name: str, config: DataConfig, split: Split) -> list[str]:
    """Return the sources whose rows are in the shards. Training shards have rows of the sources in `mix`, too."""
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


def _compare_sources(
    spark: SparkSession, platform: Platform, requests: Sequence[ShardRequest], version: int
) -> MixCopies:
    """Compare the sources of a mix at a version of `samples`, and store which training pictures copy validation or test
    pictures."""
    sources = [request.source for request in requests]
    samples = spark.read.option("versionAsOf", version).table(requests[0].table).filter(F.col("source").isin(*sources))
    found: dict[str, list[str]] = defaultdict(list)
    with translate_spark_errors("the sources of the mix could not be compared", where=", ".join(sources)):
        for row in copies_across_sources(samples).orderBy("image_id").collect():
            found[row["source"]].append(row["image_id"])
    for source, ids in found.items():
        shown = ", ".join([*ids[:SHOWN_PICTURES], *(["..."] if len(ids) > SHOWN_PICTURES else [])])
        logger.warning(
            "%d training pictures of %s are left out of the mix, because they copy validation or test pictures of "
            "other sources of the mix: %s",
            *(len(ids), source, shown),
        )
    copies = MixCopies(left_out={source: tuple(ids) for source, ids in found.items()})
    write_json(copies_file(platform.folder("shards"), requests), copies)
    return copies


def _find_or_write(
    spark: SparkSession, platform: Platform, request: ShardRequest, version: int, config: DataConfig
) -> ShardFolder:
    """Return the shard folder of a request. If the folder is missing, write the folder from a version of `samples`."""
    folder = platform.folder("shards") / request.folder_name
    reused = (folder / MANIFEST).exists()
    if not reused:
        with translate_spark_errors("the shards could not be written", where=str(folder)):
            seconds = TIME_FACTOR * config.limits.max_decode_seconds
            write_folder(select_rows(spark, request, version), folder, request, seconds)
    return ShardFolder(folder, Shards.open(folder).manifest, reused)


def _request(  # noqa: PLR0917 (as for `shard`)
    platform: Platform,
    source: str,
    config: DataConfig,
    image: ImageConfig | None,
    split: Split,
    pin: tuple[TableVersions, str],
) -> ShardRequest:
    """Return the shard request for one split of a source. `pin` has the version numbers and the id of the table."""
    shards, (version, pinned_id) = config.shards, pin
    return ShardRequest(
        table=platform.table((SAMPLES if image else TEXTS).name),
        table_id=pinned_id,
        table_version=version.last_change,
        table_commit=version.commit,
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

"""Near duplicates of an ingest: find new pictures that resemble another picture, and put both pictures in one split.

Comparing all pairs of pictures is too slow. The difference hashes of near duplicates differ in at most three of 64
bits. If the bits are cut into five blocks, the hashes of near duplicates agree in at least two blocks. So each picture
gets ten keys of 25 or 26 bits, one key per pair of blocks, and only pictures that share a key are compared. The work is
linear in the number of pictures if few pictures share a key. Keys that many pictures share, such as keys of blank
pictures or of a template, are skipped, and the skipped pictures are counted.
"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from pipelines.driver.ingest.plan import IngestPlan, held_out_rank
from pipelines.executor.ingest.fingerprint import HASH_BYTES, MAX_DIFFERING_BITS, PAIRS, keep_near_duplicates
from vlm.config import Config

BLOCKS = (13, 13, 13, 13, 12)
"""Number of bits of each block of the difference hash."""
MAX_PICTURES_OF_A_KEY = 500
FEW_PICTURES = 50_000
"""Largest number of new pictures whose keys are sent to all tasks. These keys take about 50 MB in each executor."""
COMPARED = ("image_id", "split", "fingerprint", "existing")


class NearReport(Config):
    """Counts of new pictures that resemble another picture of their source.

    Attributes:
        pictures: number of new pictures with a near duplicate.
        moved: number of new pictures that were moved to the split of their near duplicate.
        across_splits: number of new pictures with a near duplicate in another split. Either the source assigns the
            splits, or the picture resembles two pictures that were already in different splits.
        not_compared: number of new pictures with a key that more than MAX_PICTURES_OF_A_KEY pictures share.
    """

    pictures: int = 0
    moved: int = 0
    across_splits: int = 0
    not_compared: int = 0


class NearDuplicates(NamedTuple):
    """Near duplicates among the pictures of a plan, read from files in the spill folder.

    Attributes:
        shared: one row per picture and key, for keys that several pictures share, from `_shared_keys`.
        pairs: pairs of near duplicates, with the schema PAIRS.
        neighbours: split and near duplicate of each new picture that has a near duplicate, from `_resolve`.
    """

    shared: DataFrame
    pairs: DataFrame
    neighbours: DataFrame

    def report(self) -> NearReport:
        """Count the near duplicates."""
        new = self.neighbours
        counts = new.agg(F.count("*").alias("pictures"), F.count_if(F.expr("near_split <> split")).alias("moved"))
        others = new.select(F.col("image_id").alias("other_id"), F.col("near_split").alias("other_near_split"))
        apart = (
            self.pairs.join(new.select("image_id", "near_split"), "image_id")
            .join(others, "other_id", "left")
            .filter(F.col("near_split") != F.coalesce("other_near_split", "other_split"))
        )
        across = apart.agg(F.count_distinct("image_id").alias("across_splits"))
        crowded = self.shared.filter((F.col("pictures") > MAX_PICTURES_OF_A_KEY) & ~F.col("existing"))
        not_compared = crowded.agg(F.count_distinct("image_id").alias("not_compared"))
        return NearReport(**counts.crossJoin(across).crossJoin(not_compared).collect()[0].asDict())


def _key_masks() -> list[int]:
    """Return a 64-bit mask for each of the ten pairs of blocks, as signed numbers."""
    starts = [sum(BLOCKS[:n]) for n in range(len(BLOCKS))]
    blocks = [((1 << width) - 1) << start for start, width in zip(starts, BLOCKS, strict=True)]
    pairs = [a | b for a, b in combinations(blocks, len(BLOCKS) - MAX_DIFFERING_BITS)]
    return [mask - (1 << 64) if mask >> 63 else mask for mask in pairs]


KEY_MASKS = _key_masks()


def find_near_duplicates(plan: IngestPlan) -> NearDuplicates | None:
    """Compare the new pictures of a plan with each other and with the pictures of the source in `samples`.

    If no new picture shares a key with another picture, nothing is compared and the result is None.
    """
    pictures = _compared_pictures(plan)
    shared = plan.spill.materialize(_shared_keys(pictures, plan.totals.new), "shared")
    if shared.isEmpty():
        return None
    pairs = plan.spill.materialize(_find_pairs(shared, pictures), "pairs")
    move = plan.request.config.split.kind == "hash"
    neighbours = plan.spill.materialize(_resolve(pairs, move=move), "neighbours")
    return NearDuplicates(shared, pairs, neighbours)


def _compared_pictures(plan: IngestPlan) -> DataFrame:
    """Return the new pictures (`existing` is false) and the pictures in `samples`, with the columns in COMPARED."""
    new = plan.pictures.filter("NOT conflicting AND is_new").withColumn("existing", F.lit(False)).select(*COMPARED)
    existing = plan.existing.filter("fingerprint IS NOT NULL").withColumn("existing", F.lit(True)).select(*COMPARED)
    return new.unionAll(existing)


def _shared_keys(pictures: DataFrame, num_new: int) -> DataFrame:
    """Return one row per picture and key, for keys that a new picture shares with another picture.

    The columns are image_id, existing, bits (the difference hash), mask (index into KEY_MASKS), key and pictures
    (number of pictures with the key). A fingerprint is long, so a row contains only the difference hash, which is a
    part of the fingerprint.
    """
    same_key = Window.partitionBy("mask", "key")
    return (
        keys_of_new_pictures(pictures, num_new)
        .withColumn("pictures", F.count("*").over(same_key))
        .filter("pictures > 1")
    )


def keys_of_new_pictures(pictures: DataFrame, num_new: int) -> DataFrame:
    """Return one row per picture and key, for keys that a new picture has.

    Keys that only pictures in `samples` have are left out here, before the rows are sorted by key. Otherwise an ingest
    of one picture would sort ten keys of each known picture.

    Args:
        pictures: pictures with the columns in COMPARED.
        num_new: number of new pictures among `pictures`.
    """
    bits = F.conv(F.hex(F.substring("fingerprint", 1, HASH_BYTES)), 16, -10).cast("bigint")
    keys = F.array(*(F.col("bits").bitwiseAND(F.lit(mask)) for mask in KEY_MASKS))
    keyed = pictures.withColumn("bits", bits).select(
        "image_id", "existing", "bits", F.posexplode(keys).alias("mask", "key")
    )
    wanted = keyed.filter("NOT existing").select("mask", "key").distinct()
    if num_new <= FEW_PICTURES:
        wanted = F.broadcast(wanted)
    return keyed.join(wanted, ["mask", "key"], "left_semi").select("image_id", "existing", "bits", "mask", "key")


def _find_pairs(shared: DataFrame, pictures: DataFrame) -> DataFrame:
    """Return pairs of near duplicates. The first picture of a pair is new. A pair of new pictures appears twice."""
    compared = shared.filter(F.col("pictures") <= MAX_PICTURES_OF_A_KEY)
    left, right = compared.filter("NOT existing").alias("left"), compared.alias("right")
    differing = F.col("left.bits").bitwiseXOR(F.col("right.bits"))
    candidates = left.join(
        right,
        (F.col("left.mask") == F.col("right.mask"))
        & (F.col("left.key") == F.col("right.key"))
        & (F.col("left.image_id") != F.col("right.image_id"))
        & (F.bit_count(differing) <= MAX_DIFFERING_BITS)
        & (_first_shared_mask(differing) == F.col("left.mask")),  # so each pair is compared only once
    ).select("left.image_id", F.col("right.image_id").alias("other_id"))
    others = pictures.select(*(F.col(name).alias(f"other_{name.removeprefix('image_')}") for name in COMPARED))
    both = candidates.join(pictures.filter("NOT existing").drop("existing"), "image_id").join(others, "other_id")
    return both.mapInArrow(keep_near_duplicates, from_arrow_schema(PAIRS))


def _first_shared_mask(differing: Column) -> Column:
    """Return the index of the first key mask that has none of the bits in which two difference hashes differ."""
    first = F.lit(len(KEY_MASKS))
    for index, mask in reversed(list(enumerate(KEY_MASKS))):
        first = F.when(differing.bitwiseAND(F.lit(mask)) == 0, index).otherwise(first)
    return first


def _resolve(pairs: DataFrame, *, move: bool) -> DataFrame:
    """Return the near duplicate and the split of each new picture, in columns image_id, split, near_of, near_split.

    near_of is a near duplicate that was in `samples` before the ingest. If no near duplicate was in `samples`, near_of
    is the new near duplicate with the smallest id. For the new picture with the smallest id, near_of is then null.
    near_split is the split of the near duplicates in `samples`, because pictures in `samples` do not move. If no near
    duplicate is in `samples`, near_split is the first of test, val and train to which the picture or a near duplicate
    belongs. If `move` is false, near_split is the picture's own split.
    """
    rank = "array_position(array('test', 'val', 'train'), other_split)"
    first = "min(struct(NOT other_existing AS is_new, other_id)) FILTER (WHERE other_existing OR other_id < image_id)"
    existing = f"min_by(other_split, {rank}) FILTER (WHERE other_existing)"
    found = pairs.groupBy("image_id", "split").agg(
        F.expr(first).alias("first"),
        F.expr(existing).alias("existing_split"),
        F.expr(f"min_by(other_split, {rank})").alias("any_split"),
    )
    new_split = F.when(held_out_rank("any_split") < held_out_rank("split"), F.col("any_split")).otherwise(
        F.col("split")
    )
    near_split = F.coalesce("existing_split", new_split) if move else F.col("split")
    return found.select("image_id", "split", F.col("first.other_id").alias("near_of"), near_split.alias("near_split"))

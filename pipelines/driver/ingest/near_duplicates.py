"""Near duplicates of an ingest: which new pictures look like another one, and on which side of a split they belong.

All with all is out of the question. Fingerprints that differ in at most three of 64 steps agree in two of five blocks
of bits, whichever three differ; so each picture is put under ten keys of 25 bits, and only pictures under one key are
compared. That is linear in the pictures while keys are rare. Keys that many pictures share (blank ones, a template)
are left out, and counted.
"""

from __future__ import annotations

from itertools import combinations

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from pipelines.driver.ingest.plan import held_out_first
from pipelines.executor.ingest.fingerprint import MAX_STEPS, PAIRS, STEP_BYTES, near_pairs
from vlm.config import Config

BLOCKS = (13, 13, 13, 13, 12)
MAX_UNDER_A_KEY = 500
LOOKS = ("image_id", "split", "fingerprint", "known")


class NearReport(Config):
    """New pictures that look like another one of their source.

    Attributes:
        pictures: how many there are.
        moved: of these, how many are in another split than their own bytes would say, beside what they look like.
        across_splits: of these, how many look like a picture in another split: the source gives the splits, or the
            picture looks like two that had been apart before.
        not_compared: new pictures that share a key with more than MAX_UNDER_A_KEY others.
    """

    pictures: int = 0
    moved: int = 0
    across_splits: int = 0
    not_compared: int = 0


def _masks() -> list[int]:
    """The ten pairs of blocks, as signed 64-bit masks."""
    starts = [sum(BLOCKS[:n]) for n in range(len(BLOCKS))]
    blocks = [((1 << width) - 1) << start for start, width in zip(starts, BLOCKS, strict=True)]
    pairs = [a | b for a, b in combinations(blocks, len(BLOCKS) - MAX_STEPS)]
    return [mask - (1 << 64) if mask >> 63 else mask for mask in pairs]


MASKS = _masks()


def looks_of(plan: DataFrame, known: DataFrame) -> DataFrame:
    """What near duplicates are looked for among: image_id, split, fingerprint, known (was there before).

    Args:
        plan: of the ingest.
        known: rows of the source in `samples`.
    """
    new = plan.filter("NOT conflicting AND is_new").withColumn("known", F.lit(False)).select(*LOOKS)
    return new.unionAll(known.filter("fingerprint IS NOT NULL").withColumn("known", F.lit(True)).select(*LOOKS))


def shared_keys(looks: DataFrame) -> DataFrame:
    """What new pictures share a key with others: image_id, known, steps, which, key, under.

    A row a picture and key that it shares, and how many are under the key. The steps are the fingerprint's first bytes;
    the rest of it, which is long, is not put under ten keys.
    """
    steps = F.conv(F.hex(F.substring("fingerprint", 1, STEP_BYTES)), 16, -10).cast("bigint")
    keys = F.array(*(F.col("steps").bitwiseAND(F.lit(mask)) for mask in MASKS))
    under = Window.partitionBy("which", "key")
    return (
        looks.withColumn("steps", steps)
        .select("image_id", "known", "steps", F.posexplode(keys).alias("which", "key"))
        .withColumns({"under": F.count("*").over(under), "new": F.count_if(~F.col("known")).over(under)})
        .filter("under > 1 AND new > 0")
        .drop("new")
    )


def pairs_of(shared: DataFrame, looks: DataFrame) -> DataFrame:
    """Pairs of near duplicates (PAIRS), at least one of each pair new; a pair of two new ones is there twice."""
    compared = shared.filter(F.col("under") <= MAX_UNDER_A_KEY)
    left, right = compared.filter("NOT known").alias("left"), compared.alias("right")
    differ = F.col("left.steps").bitwiseXOR(F.col("right.steps"))
    candidates = left.join(
        right,
        (F.col("left.which") == F.col("right.which"))
        & (F.col("left.key") == F.col("right.key"))
        & (F.col("left.image_id") != F.col("right.image_id"))
        & (F.bit_count(differ) <= MAX_STEPS)
        & (_first_key(differ) == F.col("left.which")),  # a pair may meet under several keys
    ).select("left.image_id", F.col("right.image_id").alias("other_id"))
    others = looks.select(*(F.col(name).alias(f"other_{name.removeprefix('image_')}") for name in LOOKS))
    both = candidates.join(looks.filter("NOT known").drop("known"), "image_id").join(others, "other_id")
    return both.mapInArrow(near_pairs, from_arrow_schema(PAIRS))


def _first_key(differ: Column) -> Column:
    """The first key that two fingerprints share, from the bits in which they differ."""
    first = F.lit(len(MASKS))
    for which, mask in reversed(list(enumerate(MASKS))):
        first = F.when(differ.bitwiseAND(F.lit(mask)) == 0, which).otherwise(first)
    return first


def neighbours_of(pairs: DataFrame, *, move: bool) -> DataFrame:
    """One row a new picture that has near duplicates: image_id, split, near_of, near_split.

    near_of is one that was there before, else the first by its id; null for that one itself. near_split is the split
    the picture goes to: that of the near duplicates in `samples`, which do not move, else the most held out of those
    that came together. Without `move`, its own.
    """
    rank = "array_position(array('test', 'val', 'train'), other_split)"
    first = "min(struct(NOT other_known AS came, other_id)) FILTER (WHERE other_known OR other_id < image_id)"
    there = f"min_by(other_split, {rank}) FILTER (WHERE other_known)"
    found = pairs.groupBy("image_id", "split").agg(
        F.expr(first).alias("first"), F.expr(there).alias("there"), F.expr(f"min_by(other_split, {rank})").alias("came")
    )
    together = F.when(held_out_first("came") < held_out_first("split"), F.col("came")).otherwise(F.col("split"))
    moved = F.coalesce("there", together) if move else F.col("split")
    return found.select("image_id", "split", F.col("first.other_id").alias("near_of"), moved.alias("near_split"))


def report_of(shared: DataFrame, pairs: DataFrame, neighbours: DataFrame) -> NearReport:
    """Count what was found."""
    counted = neighbours.agg(F.count("*").alias("pictures"), F.count_if(F.expr("near_split <> split")).alias("moved"))
    others = neighbours.select(F.col("image_id").alias("other_id"), F.col("near_split").alias("other_near_split"))
    apart = (
        pairs.join(neighbours.select("image_id", "near_split"), "image_id")
        .join(others, "other_id", "left")
        .filter(F.col("near_split") != F.coalesce("other_near_split", "other_split"))
    )
    across = apart.agg(F.count_distinct("image_id").alias("across_splits"))
    crowded = shared.filter((F.col("under") > MAX_UNDER_A_KEY) & ~F.col("known"))
    not_compared = crowded.agg(F.count_distinct("image_id").alias("not_compared"))
    return NearReport(**counted.crossJoin(across).crossJoin(not_compared).collect()[0].asDict())

"""Search for pairs of near-duplicate pictures by the fingerprints in `samples`.

Comparing all pairs of pictures is too slow. The difference hashes of near duplicates differ in at most three of 64
bits. If the bits are cut into five blocks, the hashes of near duplicates agree in at least two blocks. So each picture
gets ten keys of 25 or 26 bits, one key per pair of blocks, and only pictures that share a key are compared. The work is
linear in the number of pictures if few pictures share a key. Keys that many pictures share, such as keys of blank
pictures or of a template, are skipped.
"""

from __future__ import annotations

from functools import reduce
from itertools import combinations

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from pipelines.executor.ingest.fingerprint import HASH_BYTES, MAX_DIFFERING_BITS, PAIRS, keep_near_duplicates

BLOCKS = (13, 13, 13, 13, 12)
"""Number of bits of each block of the difference hash."""
MAX_PICTURES_OF_A_KEY = 500
FEW_PICTURES = 50_000
"""If there are at most this many new pictures, all of their keys are sent to every task (about 50 MB per executor)."""
FEW_CANDIDATES = 100_000
"""If there are at most this many pairs to compare, the fingerprints of their pictures are sent to every task (about
30 MB per executor)."""
COMPARED = ("image_id", "split", "fingerprint", "existing")


def _key_masks() -> list[int]:
    """Return a 64-bit mask for each of the ten pairs of blocks, as signed numbers."""
    starts = [sum(BLOCKS[:n]) for n in range(len(BLOCKS))]
    blocks = [((1 << width) - 1) << start for start, width in zip(starts, BLOCKS, strict=True)]
    pairs = [a | b for a, b in combinations(blocks, len(BLOCKS) - MAX_DIFFERING_BITS)]
    return [mask - (1 << 64) if mask >> 63 else mask for mask in pairs]


KEY_MASKS = _key_masks()


def shared_keys(pictures: DataFrame, num_new: int) -> DataFrame:
    """For each key that a new picture shares with another picture, return one row for each picture with this key.

    The columns of the result are image_id, existing, bits (the difference hash), mask (index into KEY_MASKS), key and
    pictures (number of pictures with the key). A fingerprint is long, so a row contains only the difference hash, which
    is a part of the fingerprint.
    """
    same_key = Window.partitionBy("mask", "key")
    return (
        keys_of_new_pictures(pictures, num_new)
        .withColumn("pictures", F.count("*").over(same_key))
        .filter("pictures > 1")
    )


def keys_of_new_pictures(pictures: DataFrame, num_new: int) -> DataFrame:
    """For each key of a new picture, return one row for each picture with this key.

    This function leaves out keys that no new picture has, before the rows are sorted by key. Without this filter, an
    ingest of one picture would sort ten keys of each known picture.

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


def find_candidates(shared: DataFrame) -> DataFrame:
    """Return the pairs of pictures whose difference hashes are nearly equal, in columns image_id (new) and other_id.

    A key that more than MAX_PICTURES_OF_A_KEY pictures share is ignored. Pictures that share no other key are not
    compared.

    Args:
        shared: result of `shared_keys`.
    """
    compared = shared.filter(F.col("pictures") <= MAX_PICTURES_OF_A_KEY)
    left, right = compared.filter("NOT existing").alias("left"), compared.alias("right")
    differing = F.col("left.bits").bitwiseXOR(F.col("right.bits"))
    return left.join(
        right,
        (F.col("left.mask") == F.col("right.mask"))
        & (F.col("left.key") == F.col("right.key"))
        & (F.col("left.image_id") != F.col("right.image_id"))
        & (F.bit_count(differing) <= MAX_DIFFERING_BITS)
        & (_first_shared_mask(differing) == F.col("left.mask")),  # so a pair that shares several keys occurs once
    ).select("left.image_id", F.col("right.image_id").alias("other_id"))


def find_pairs(candidates: DataFrame, pictures: DataFrame, num_candidates: int | None = None) -> DataFrame:
    """Return pairs of near duplicates. The first picture of each pair is new.

    If both pictures a and b of a pair are new, the result contains (a, b) and (b, a).

    Args:
        candidates: pairs of pictures to compare, from `find_candidates`.
        pictures: pictures with the columns in COMPARED.
        num_candidates: number of `candidates`, or None if the number is not known. If the number is small, the known
            pictures are not sorted.
    """
    others = pictures.select(*(F.col(name).alias(f"other_{name.removeprefix('image_')}") for name in COMPARED))
    if num_candidates is not None and num_candidates <= FEW_CANDIDATES:
        ids = F.broadcast(candidates.select("other_id").distinct())
        others = F.broadcast(others.join(ids, "other_id", "left_semi"))
    both = candidates.join(pictures.filter("NOT existing").drop("existing"), "image_id").join(others, "other_id")
    return both.mapInArrow(keep_near_duplicates, from_arrow_schema(PAIRS))


def copies_across_sources(samples: DataFrame) -> DataFrame:
    """Return the training pictures that copy a validation or test picture of another source (columns image_id, source).

    A training picture counts as a copy if both pictures have the same bytes or fingerprint, or are near duplicates by
    their fingerprints. Pictures without a fingerprint are compared by their bytes.

    Args:
        samples: rows of `samples` of several sources.
    """
    pictures = samples.select("image_id", "source", "sha256", "split", "fingerprint")
    # Most pictures are training pictures. Training pictures are marked as existing, so that they are not compared with
    # each other.
    pictures = pictures.withColumn("existing", F.col("split") == "train")
    training, held_out = pictures.filter("existing"), pictures.filter("NOT existing")
    others = held_out.select(F.col("source").alias("other_source"), "sha256", "fingerprint")
    same = [
        training.join(others.drop(unused).distinct(), key)  # many blank pictures share a fingerprint
        for key, unused in (("sha256", "fingerprint"), ("fingerprint", "sha256"))
    ]
    compared = pictures.filter("fingerprint IS NOT NULL")
    candidates = find_candidates(shared_keys(compared, held_out.count()))
    pairs = find_pairs(candidates, compared).filter("other_existing")
    pairs = pairs.select(F.col("image_id").alias("held_out_id"), F.col("other_id").alias("image_id"))
    owners = held_out.select(F.col("image_id").alias("held_out_id"), F.col("source").alias("other_source"))
    near = pairs.join(owners, "held_out_id").join(training.select("image_id", "source"), "image_id")
    found = [copies.select("image_id", "source", "other_source") for copies in (*same, near)]
    return reduce(DataFrame.unionAll, found).filter("source <> other_source").select("image_id", "source").distinct()


def _first_shared_mask(differing: Column) -> Column:
    """Return the index of the first key mask that has none of the bits in which two difference hashes differ."""
    first = F.lit(len(KEY_MASKS))
    for index, mask in reversed(list(enumerate(KEY_MASKS))):
        first = F.when(differing.bitwiseAND(F.lit(mask)) == 0, index).otherwise(first)
    return first

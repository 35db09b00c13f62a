"""Near duplicates of an ingest: find new pictures that resemble other pictures, and put these pictures in one split.

Pictures are moved only if a hash assigns the splits (`data.split.kind` is `hash`). `near_pairs.py` compares only
pictures that share a key (a part of their hashes). A key that too many pictures share is skipped. The ingest report
counts the new pictures with such a key (`not_compared`).
"""

from __future__ import annotations

from typing import NamedTuple

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from pipelines.driver.delta.near_pairs import (
    COMPARED,
    MAX_PICTURES_OF_A_KEY,
    find_candidates,
    find_pairs,
    shared_keys,
)
from pipelines.driver.ingest.plan import IngestPlan, held_out_rank
from vlm.config import Config


class NearReport(Config):
    """Counts of new pictures that resemble another picture of their source.

    Attributes:
        pictures: number of new pictures with a near duplicate.
        moved: number of new pictures that were moved to the split of their near duplicate.
        across_splits: number of new pictures with a near duplicate in another split. Such a picture usually has one of
            two causes: the source assigns the splits, or the picture resembles two earlier pictures in different
            splits.
        not_compared: number of new pictures with a key that is skipped, because more than MAX_PICTURES_OF_A_KEY
            pictures share the key.
    """

    pictures: int = 0
    moved: int = 0
    across_splits: int = 0
    not_compared: int = 0


class NearDuplicates(NamedTuple):
    """Near duplicates among the pictures of an ingest plan, read from files in the spill folder.

    Attributes:
        shared: result of `shared_keys`, with one row for each pair of a picture and a key that the picture shares.
        pairs: pairs of near duplicates, with the schema PAIRS.
        neighbours: result of `_resolve`, with one row for each new picture that has a near duplicate.
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


def find_near_duplicates(plan: IngestPlan) -> NearDuplicates | None:
    """Compare the new pictures of a plan with each other and with the pictures of the source in `samples`.

    If no new picture shares a key with another picture, nothing is compared and the result is None.
    """
    pictures = _compared_pictures(plan)
    shared = plan.spill.materialize(shared_keys(pictures, plan.totals.new), "shared")
    if shared.isEmpty():
        return None
    candidates = plan.spill.materialize(find_candidates(shared), "candidates")
    pairs = plan.spill.materialize(find_pairs(candidates, pictures, candidates.count()), "pairs")
    move = plan.request.config.split.kind == "hash"
    neighbours = plan.spill.materialize(_resolve(pairs, move=move), "neighbours")
    return NearDuplicates(shared, pairs, neighbours)


def _compared_pictures(plan: IngestPlan) -> DataFrame:
    """Return the columns COMPARED of the new pictures (`existing` is false) and of `samples` (with a fingerprint)."""
    new = plan.pictures.filter("NOT conflicting AND is_new").withColumn("existing", F.lit(False)).select(*COMPARED)
    existing = plan.existing.filter("fingerprint IS NOT NULL").withColumn("existing", F.lit(True)).select(*COMPARED)
    return new.unionAll(existing)


def _resolve(pairs: DataFrame, *, move: bool) -> DataFrame:
    """For each new picture in `pairs`, choose a near duplicate (near_of) and a split (near_split).

    The columns of the result are image_id, split, near_of and near_split. near_of is a near duplicate that was in
    `samples` before the ingest. If no near duplicate was in `samples`, near_of is the new near duplicate with the
    smallest id. If all near duplicates are new and have larger ids than the picture, near_of is null. near_split is the
    split of the near duplicates in `samples` (the first of test, val and train), because pictures in `samples` do not
    move. If no near duplicate is in `samples`, the splits of the picture and its near duplicates decide: near_split is
    test if one of them is in test, else val if one of them is in val, else train. If `move` is false, near_split is the
    picture's own split.
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

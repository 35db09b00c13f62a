"""SQL conditions that select the rows of one model by the digest of its files.

A row that Lakesight 0.1.0 wrote has no digest, and belongs to a model if the row and the model have the same MLflow
run.
"""

from __future__ import annotations

from pyspark.sql import Column
from pyspark.sql import functions as F

SAME_MODEL = (
    "(old.model_digest = new.model_digest OR old.run_id = new.run_id AND "
    "(old.model_digest IS NULL OR new.model_digest IS NULL))"
)
"""Condition of a merge that is true if a row of the table (`old`) and a new row (`new`) belong to the same model."""


def is_of_model(digest: str, run_id: str) -> Column:
    """Return the SQL condition that selects the rows of one model. If the digest is not known, `digest` is empty."""
    without_digest = F.col("model_digest").isNull() & (F.col("run_id") == run_id)
    return (F.col("model_digest") == digest) | without_digest if digest else without_digest

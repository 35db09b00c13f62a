"""Table `decisions`, which records who promoted, refused or rolled back which model version, when and why.

On a laptop the table is written as files, so a rollback needs no Spark. In a workspace Spark writes to the catalog.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from pipelines.driver.delta.row_times import later_than, newest_time
from pipelines.formats.delta_files import is_supported, open_or_create, query_rows, quoted_text
from pipelines.formats.tables import DECISIONS
from pipelines.platform import Platform, user_name

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


CHAMPION_ACTIONS = ("promote", "rollback")
"""Actions that make a version the champion."""


def record_decision(
    open_spark: Callable[[], SparkSession],
    platform: Platform,
    *,
    model: str,
    version: str,
    digest: str,
    action: Literal["promote", "refuse", "rollback"],
    champion: str | None,
    champion_digest: str | None = None,
    reasons: Sequence[str] = (),
    figures: str = "{}",
    seen_at: datetime | None = None,
) -> None:
    """Append a decision to table `decisions`. Call this function before the registry is changed, so that every change
    of the champion is recorded.

    Args:
        open_spark: function that returns the Spark session. The function is called only if the table cannot be opened
            without Spark, for example in a catalog.
        platform: platform that stores the table.
        model: name of the registered model.
        version: model version that the decision is about.
        digest: digest of the files of this model version.
        action: decision about the model version, which is 'promote', 'refuse' or 'rollback'.
        champion: version of the current champion, or None if there is no champion.
        champion_digest: digest of the files of the current champion, or None if there is no champion or if the registry
            has no digest of its files.
        reasons: reasons why the model version was refused.
        figures: metrics that the decision is based on, as a JSON object.
        seen_at: time at which the registry was found in this state, for a decision that was made elsewhere. A decision
            that another command records in the meantime stays the newest decision. None: the decision is made now, and
            becomes the newest decision.
    """
    row: dict[str, Any] = {
        "decision_id": uuid4().hex,
        "model_name": model,
        "model_version": version,
        "action": action,
        "champion": champion,
        "reasons": list(reasons),
        "figures": figures,
        "decided_by": user_name(),
        "model_digest": digest,
        "champion_digest": champion_digest,
        "decided_at": seen_at,
    }
    if not is_supported(platform.tables):
        _append_to_catalog(open_spark(), platform, row)
        return
    import pyarrow as pa
    from deltalake import write_deltalake

    table = open_or_create(platform.tables / DECISIONS.name, DECISIONS)
    if seen_at is None:
        [earlier] = query_rows(table, "MAX(decided_at) AS newest", f"model_name = {quoted_text(model)}")
        row["decided_at"] = later_than(earlier["newest"])
    write_deltalake(table, pa.Table.from_pylist([row], DECISIONS.arrow_schema), mode="append")


def recorded_champion(
    open_spark: Callable[[], SparkSession], platform: Platform, model: str
) -> tuple[str, str | None] | None:
    """Return the number and the digest of the champion of a model according to table `decisions`. The champion is the
    version of the last promotion or rollback. Return None if the table has no promotion and no rollback of the model.
    The digest is None if Lakesight 0.1.0 wrote the row.

    The registry and the table `decisions` have different champions if a command was killed after it had recorded a
    decision and before it changed the registry.
    """
    change = newest_champion_change(open_spark, platform, model)
    return (change["model_version"], change["model_digest"]) if change else None


def newest_champion_change(
    open_spark: Callable[[], SparkSession], platform: Platform, model: str
) -> dict[str, Any] | None:
    """Return the row of the last promotion or rollback of the model in table `decisions`, or None if there is none."""
    return next(reversed(_champion_changes(open_spark, platform, model)), None)


def find_rollback(
    open_spark: Callable[[], SparkSession], platform: Platform, *, model: str, version: str, digest: str
) -> dict[str, Any] | None:
    """Return the row of the rollback that has replaced a version of a model.

    Return None if no rollback has replaced the version, or if the version has become the champion again since then.

    If a row has no digest for a version, only the number identifies the version.

    Args:
        open_spark: function that returns the Spark session. The function is called only if the table cannot be opened
            without Spark, for example in a catalog.
        platform: platform that stores the table.
        model: name of the registered model.
        version: number of the version.
        digest: digest of the files of this version.
    """

    def is_version(number: str | None, of_files: str | None) -> bool:
        return number == version if of_files is None else of_files == digest

    change: dict[str, Any]
    for change in reversed(_champion_changes(open_spark, platform, model)):
        if is_version(change["model_version"], change["model_digest"]):
            return None
        if change["action"] == "rollback" and is_version(change["champion"], change["champion_digest"]):
            return change
    return None


def _champion_changes(open_spark: Callable[[], SparkSession], platform: Platform, model: str) -> list[dict[str, Any]]:
    """Return the rows of table `decisions` that have made a version of a model the champion, newest last."""
    if not is_supported(platform.tables):
        from pyspark.sql import functions as F

        from pipelines.driver.delta.tables import ensure_tables

        ensure_tables(open_spark(), platform)
        made = (F.col("model_name") == model) & F.col("action").isin(*CHAMPION_ACTIONS)
        found = open_spark().table(platform.table(DECISIONS.name)).where(made).orderBy("decided_at")
        rows: list[dict[str, Any]] = found.toArrow().to_pylist()  # unlike rows of Spark, the times have a time zone
        return rows
    table = open_or_create(platform.tables / DECISIONS.name, DECISIONS)
    actions = ", ".join(map(quoted_text, CHAMPION_ACTIONS))
    is_made = f"model_name = {quoted_text(model)} AND action IN ({actions})"
    return query_rows(table, ", ".join(DECISIONS.names), is_made, "ORDER BY decided_at")


def _append_to_catalog(spark: SparkSession, platform: Platform, row: dict[str, Any]) -> None:
    """Append a row with Spark, and record the user of the Spark session as the person who decided."""
    from pyspark.sql import functions as F

    from pipelines.driver.delta.tables import ensure_tables

    ensure_tables(spark, platform)
    name = platform.table(DECISIONS.name)
    if row["decided_at"] is None:
        earlier = spark.table(name).where(F.col("model_name") == row["model_name"])
        row["decided_at"] = later_than(newest_time(earlier, "decided_at"))
    new = spark.createDataFrame([tuple(row[name] for name in DECISIONS.names)], DECISIONS.ddl())
    new.withColumn("decided_by", F.current_user()).writeTo(name).append()

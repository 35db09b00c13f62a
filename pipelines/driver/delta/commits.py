"""Ids of Delta commits. The ids distinguish two tables with equal version numbers.

If the log of the table is in a local folder, the id is usually a hash of the commit file (`commit_id`). In all other
cases, for example in a catalog, the id is a hash of the commit's row in the table history.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from deltalake import DeltaTable
from pyspark.sql import DataFrame, SparkSession

from pipelines.config import short_hash
from pipelines.driver.delta.on_disk import open_on_disk
from pipelines.formats.delta_files import commit_id, local_folder
from pipelines.formats.table_schema import Table
from pipelines.platform import Platform

MIGRATION_NOTE = "lakesight migration"
"""User metadata of migration commits, which change no content. `migrate --undo` also writes this note."""
FIELDS = ("version", "operation", "operationMetrics")
RESTORE = re.compile(r"RESTORE|CLONE|(CREATE OR )?REPLACE TABLE( AS SELECT)?")
"""Pattern of the Delta operations that replace all rows of a table, so that rows of earlier table versions may be
gone."""


class TableHistory(NamedTuple):
    """Facts from a table's history about the commits that made the rows of the table.

    Attributes:
        newest: newest version of the table.
        replaced: last version in which all rows of the table were replaced, for example by RESTORE; 0 if there is none.
            The undo of a migration is a RESTORE that changes no row, and does not count.
        commits: dict from a version to the id of its commit, without the versions that Delta no longer keeps.
    """

    newest: int
    replaced: int
    commits: Mapping[int, str]

    def has(self, version: int, commit: str) -> bool:
        """Return true if the table still has a commit and no later commit has replaced all rows.

        By default, Delta keeps commits for 30 days. If the commit of a version is gone, only the version number is
        compared with `replaced` and `newest`.
        """
        return self.replaced <= version <= self.newest and self.commits.get(version, commit) == commit


def log_folder(location: Path | str | None) -> Path | None:
    """Return the folder of a table if the table's log is in a local folder, else None."""
    return Path(location) if location is not None and Path(location, "_delta_log").is_dir() else None


def read_commit_ids(
    spark: SparkSession, name: str, location: Path | str | None, versions: Collection[int]
) -> dict[int, str]:
    """Return a dict from each version to the id of its commit, without the versions that Delta no longer keeps.

    Args:
        spark: Spark session.
        name: name of the table in SQL.
        location: folder or URL of the table, or None if a catalog manages the table.
        versions: versions of the table.
    """
    if folder := log_folder(location):
        return _ids_of_files(folder, versions)
    if not versions:
        return {}
    history = with_time(spark.sql(f"DESCRIBE HISTORY {name}")).filter(f"version IN ({', '.join(map(str, versions))})")
    return {row["version"]: history_id(row.asDict()) for row in history.collect()}


def with_time(history: DataFrame, *others: str) -> DataFrame:
    """Select the columns FIELDS and `others` from a table history, and add `micros`, the time of the commit in
    microseconds."""
    return history.selectExpr(*FIELDS, *others, "unix_micros(timestamp) AS micros")


def history_id(commit: Mapping[str, Any]) -> str:
    """Return the id of a commit, given its row in a table history with the columns of `with_time`."""
    metrics = sorted((commit["operationMetrics"] or {}).items())
    return short_hash(commit["version"], commit["micros"], commit["operation"], metrics)


def read_history(spark: SparkSession, platform: Platform, table: Table, versions: Collection[int]) -> TableHistory:
    """Read the history of one of Lakesight's tables, with the ids of the commits that made `versions`."""
    if (opened := open_on_disk(platform, table)) is not None:
        return read_history_of_files(opened, versions)
    name = platform.table(table.name)
    history = with_time(spark.sql(f"DESCRIBE HISTORY {name}"), "operationParameters", "userMetadata")
    commits = [row.asDict() for row in history.collect()]
    return _history(commits, {commit["version"]: history_id(commit) for commit in commits})


def read_history_of_files(table: DeltaTable, versions: Collection[int]) -> TableHistory:
    """Read the same history as `read_history`, but without Spark, from a table in a local folder."""
    return _history(table.history(), _ids_of_files(local_folder(table), versions))


def _ids_of_files(folder: Path, versions: Collection[int]) -> dict[int, str]:
    found = {version: commit_id(folder, version) for version in versions}
    return {version: each for version, each in found.items() if each is not None}


def _history(commits: list[dict[str, Any]], ids: Mapping[int, str]) -> TableHistory:
    replaced = [commit["version"] for commit in commits if _replaces_all_rows(commit)]
    return TableHistory(max(commit["version"] for commit in commits), max(replaced, default=0), ids)


def _replaces_all_rows(commit: Mapping[str, Any]) -> bool:
    if commit.get("userMetadata") == MIGRATION_NOTE:
        return False
    parameters = commit.get("operationParameters") or {}
    operation = commit.get("operation") or ""
    overwrites = operation == "WRITE" and parameters.get("mode") == "Overwrite"
    whole = parameters.get("predicate") in {None, "", "[]"}
    return RESTORE.fullmatch(operation) is not None or (overwrites and whole)

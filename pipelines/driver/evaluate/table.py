"""Functions that merge the metrics of an evaluation into table `evaluations`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pyspark.sql import SparkSession

from pipelines.driver.delta.model_rows import SAME_MODEL
from pipelines.driver.delta.on_disk import equal_to
from pipelines.driver.delta.retry import retry_on_conflict
from pipelines.driver.delta.row_times import later_than
from pipelines.driver.delta.tables import ensure_tables, open_tables
from pipelines.driver.evaluate.metrics import tokenisation_of
from pipelines.formats.delta_files import query_rows
from pipelines.formats.shards import Shards
from pipelines.formats.tables import EVALUATIONS, MODEL_DIGEST
from pipelines.platform import Platform

if TYPE_CHECKING:
    from pipelines.driver.evaluate.bootstrap import Interval
    from pipelines.driver.evaluate.run import EvaluationReport

GROUP = ("model_name", "model_version", "source", "split")
"""Columns that are equal in all rows of an evaluation and are never null."""
KEY = tuple(name for name in EVALUATIONS.key if name != MODEL_DIGEST.name)
VALUES = ("value", "low", "high", "n", "tokenisation")


def merge_report(spark: SparkSession, platform: Platform, report: EvaluationReport, shards: Shards) -> None:
    """Merge a report on a captioner into the table. If the captions were generated with settings that differ from the
    model version's own settings, do nothing. `shards` are the shards of the evaluated split.
    """
    if report.settings is None:
        merge_rows(spark, platform, list(report_rows(report, shards.manifest.request.where)))


def report_rows(report: EvaluationReport, where: str) -> Iterator[dict[str, object]]:
    """Yield the report as rows of the table. `where` is the condition that selected the pictures, or empty."""
    parts: list[tuple[str | None, Mapping[str, Interval]]] = [(None, report.metrics), *report.slices.items()]
    fields = set(EVALUATIONS.names) & type(report).model_fields.keys() - {"tokenisation"}
    shared = {name: getattr(report, name) for name in fields} | {MODEL_DIGEST.name: report.model_digest or None}
    shared["shards_where"] = where or None
    for part, metrics in parts:
        count = report.pictures if part is None else report.slice_rows.get(part, report.pictures)
        for name, metric in metrics.items():
            row = {"slice": part, "metric": name, "n": count, "tokenisation": tokenisation_of(name)}
            yield shared | row | metric.model_dump()


def merge_rows(spark: SparkSession, platform: Platform, rows: Sequence[Mapping[str, Any]]) -> None:
    """Merge the rows of one evaluation into table `evaluations`, as the newest evaluation of its pictures.

    This function is also called for a reused evaluation. Since the evaluation was computed, the table may have been
    dropped or restored from a copy, or may have got a newer evaluation of the same model version and split. If the
    table has all rows and no newer evaluation, nothing is written. All written rows have the same time, which is later
    than the times of all rows of the same model version, source and split.

    Args:
        spark: Spark session.
        platform: platform that stores the table.
        rows: rows to merge, each a dict from the name of a column to the value, without the column `evaluated_at`.
    """
    stored = _read_rows(spark, platform, {name: rows[0][name] for name in GROUP})
    if _is_newest(rows, stored):
        return
    evaluated_at = later_than(max((row["evaluated_at"] for row in stored), default=None))
    values = [tuple({**row, "evaluated_at": evaluated_at}[name] for name in EVALUATIONS.names) for row in rows]
    table = platform.table(EVALUATIONS.name)
    retry_on_conflict(partial(_merge, spark, table, values), where=table)


def _read_rows(spark: SparkSession, platform: Platform, equal: Mapping[str, str]) -> list[dict[str, Any]]:
    """Read the rows of a model version, source and split. Create the table, or add its missing columns, if necessary.

    A table in a local folder is read without Spark, which saves the time of a Spark query.
    """
    if opened := open_tables(platform, EVALUATIONS):
        return query_rows(opened[EVALUATIONS.name], ", ".join(EVALUATIONS.names), equal_to(equal))
    ensure_tables(spark, platform)
    found = spark.table(platform.table(EVALUATIONS.name))
    for name, value in equal.items():
        found = found.where(found[name] == value)
    rows: list[dict[str, Any]] = found.select(*EVALUATIONS.names).toArrow().to_pylist()
    return rows


def _is_newest(rows: Sequence[Mapping[str, Any]], stored: Sequence[Mapping[str, Any]]) -> bool:
    """Return true if the table has all rows of an evaluation and no newer evaluation of the same model version with the
    same condition on the pictures."""
    first = rows[0]
    same = [row for row in stored if _same_model(row, first) and row["shards_where"] == first["shards_where"]]
    found = {tuple(row[name] for name in KEY): row for row in same}
    for row in rows:
        old = found.get(tuple(row[name] for name in KEY))
        if old is None or any(old[name] != row[name] for name in VALUES):
            return False
    newest = max(same, key=lambda row: row["evaluated_at"])
    return bool(newest["dataset_version"] == first["dataset_version"])


def _same_model(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Return whether two rows belong to the same model, by the same rule as SAME_MODEL."""
    digests = old[MODEL_DIGEST.name], new[MODEL_DIGEST.name]
    return bool(digests[0] == digests[1] if all(digests) else old["run_id"] == new["run_id"])


def _merge(spark: SparkSession, table: str, values: list[tuple[object, ...]]) -> None:
    new = spark.createDataFrame(values, EVALUATIONS.ddl())
    keys = " AND ".join(f"old.{key} <=> new.{key}" for key in KEY)
    spark.sql(
        f"MERGE INTO {table} old USING {{rows}} new ON {keys} AND {SAME_MODEL} "
        f"WHEN MATCHED THEN {EVALUATIONS.update_clause('new')} "
        f"WHEN NOT MATCHED THEN {EVALUATIONS.insert_clause('new')}",
        rows=new,
    )

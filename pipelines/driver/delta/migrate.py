"""Migration of the tables and the home folder to the format of this release, and undo of a migration.

Each step of a migration is a function. The function returns the SQL statements that bring one table to the next format,
so a dry run prints exactly the statements that a migration executes. Before the first change, the version of each table
is written to the file BACKUP of the home folder. `undo` restores the versions in BACKUP.

A migration changes no rows, and its commits have a note that says so (`commits.MIGRATION_NOTE`). Therefore shards,
runs, evaluations and captions stay valid, and no stage repeats its work.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from pyspark.sql import SparkSession

from pipelines.driver.delta.commits import MIGRATION_NOTE
from pipelines.driver.delta.retry import retry_on_conflict
from pipelines.driver.delta.spark_errors import translate_spark_errors
from pipelines.driver.delta.tables import missing_checks, missing_columns, table_properties
from pipelines.driver.delta.versions import MAINTENANCE_OPERATIONS, commit_note, newest_version
from pipelines.errors import UserError
from pipelines.formats.format_version import FILE, FORMAT, PROPERTY, check_format, read_home_format, write_home_format
from pipelines.formats.run_folder import read_json, write_json
from pipelines.formats.table_schema import Table
from pipelines.formats.tables import TABLES
from pipelines.platform import Platform
from vlm.config import Config

BACKUP = "migration.json"

Step = Callable[[SparkSession, str, Table], list[str]]


def _complete_schema(spark: SparkSession, name: str, table: Table) -> list[str]:
    """Return the SQL statements that bring a table to format 1: statements that add the missing columns and
    constraints.
    """
    return [*missing_columns(spark, name, table), *missing_checks(spark, name, table.checks).values()]


STEPS: tuple[Step, ...] = (_complete_schema,)
"""Steps of a migration, in order. `STEPS[N - 1]` brings a table to format N."""


class TableMigration(Config):
    """Format of a table before the migration, and the SQL statements of the migration."""

    table: str
    format: int
    statements: tuple[str, ...]


class MigrationReport(Config):
    """Report on a migration: format of the home folder before and after the migration, and changes of each table."""

    before: int
    after: int
    dry_run: bool
    tables: tuple[TableMigration, ...]


class Backup(Config):
    """Content of BACKUP: format of the home folder and version of each table before the migration."""

    format: int
    versions: dict[str, int]


def migrate(spark: SparkSession, platform: Platform, *, dry_run: bool) -> MigrationReport:
    """Bring all tables and the home folder to the format of this release. A dry run changes nothing.

    An interrupted migration is completed by the next call. The migration leaves out tables that do not exist, because a
    new table has the format of the release that creates the table.

    Raises:
        UserError: a newer release of Lakesight wrote a table, or the format of the home folder cannot be read.
        StageFailed: Spark failed, or every attempt to change a table conflicted with another writer.
    """
    before, tables = read_home_format(platform.root), _existing(spark, platform)
    if not dry_run and before < FORMAT and not _was_interrupted(platform.root / BACKUP, before):
        versions = {table.name: newest_version(spark, name) for table, name in tables}
        write_json(platform.root / BACKUP, Backup(format=before, versions=versions))
    migrated = []
    for table, name in tables:
        with translate_spark_errors("a table could not be migrated", where=name), commit_note(spark, MIGRATION_NOTE):
            migrated.append(retry_on_conflict(partial(_migrate_table, spark, name, table, dry_run), name))
    if not dry_run:
        write_home_format(platform.root, FORMAT)
    return MigrationReport(before=before, after=FORMAT, dry_run=dry_run, tables=tuple(migrated))


def _was_interrupted(backup: Path, home_format: int) -> bool:
    """Return whether a backup belongs to an interrupted migration.

    A migration first changes all tables and only then the format of the home folder. After an interruption, the home
    folder therefore still has the format that the backup contains.
    """
    return backup.exists() and read_json(backup, Backup).format == home_format


def _migrate_table(spark: SparkSession, name: str, table: Table, dry_run: bool) -> TableMigration:
    found = _format(spark, name)
    check_format(found, name)
    planned: list[str] = []
    for number, step in enumerate(STEPS[found:], found + 1):
        statements = [*step(spark, name, table), f"ALTER TABLE {name} SET TBLPROPERTIES ('{PROPERTY}' = '{number}')"]
        planned += statements
        for statement in () if dry_run else statements:
            spark.sql(statement)
    return TableMigration(table=table.name, format=found, statements=tuple(planned))


def undo(spark: SparkSession, platform: Platform) -> MigrationReport:
    """Restore the migrated tables, and the format of the home folder, to their state before the last migration.

    Raises:
        UserError: there is no migration to undo, or the undo would remove rows that were written after the migration.
        StageFailed: Spark failed, for example because VACUUM has removed files of the earlier table versions.
    """
    path = platform.root / BACKUP
    if not path.exists():
        raise UserError(
            "there is no migration to undo",
            where=str(path),
            got="the file does not exist",
            fix="do nothing: no migration was run, or the last migration is already undone",
        )
    backup, before = read_json(path, Backup), read_home_format(platform.root)
    tables = [(table, name) for table, name in _existing(spark, platform) if table.name in backup.versions]
    for table, name in tables:
        _require_no_writes(spark, name, backup.versions[table.name])
    restored = []
    for table, name in tables:
        version = backup.versions[table.name]
        statement = f"RESTORE TABLE {name} TO VERSION AS OF {version}"
        restored.append(TableMigration(table=table.name, format=_format(spark, name), statements=(statement,)))
        with translate_spark_errors("a table could not be restored", where=name), commit_note(spark, MIGRATION_NOTE):
            spark.sql(statement).collect()
    if backup.format:
        write_home_format(platform.root, backup.format)
    else:
        (platform.root / FILE).unlink(missing_ok=True)
    path.unlink()
    return MigrationReport(before=before, after=backup.format, dry_run=False, tables=tuple(restored))


def _require_no_writes(spark: SparkSession, name: str, version: int) -> None:
    """Check that no commit after a version has changed rows. Commits of migrations are ignored."""
    history = spark.sql(f"DESCRIBE HISTORY {name}").where(f"version > {version}")
    written = [
        f"{commit['operation']} at version {commit['version']}"
        for commit in history.select("version", "operation", "userMetadata").collect()
        if commit["operation"] not in MAINTENANCE_OPERATIONS and commit["userMetadata"] != MIGRATION_NOTE
    ]
    if written:
        raise UserError(
            "the migration cannot be undone, because rows were written after the migration",
            where=name,
            got=", ".join(written[:5]),
            fix="keep the new format, or restore a copy of the tables that was made before the migration",
        )


def _existing(spark: SparkSession, platform: Platform) -> list[tuple[Table, str]]:
    """Return the existing tables, each with its name in SQL statements.

    On a laptop, this name contains the path of the table's folder, because Spark's catalog in memory is empty until a
    command registers the tables.
    """
    if platform.tables is None:
        return [(table, name) for table in TABLES if spark.catalog.tableExists(name := platform.table(table.name))]
    folders = [(table, platform.tables / table.name) for table in TABLES]
    return [(table, _sql_path(folder)) for table, folder in folders if (folder / "_delta_log").is_dir()]


def _sql_path(folder: Path) -> str:
    escaped = str(folder).replace("`", "``")
    return f"delta.`{escaped}`"


def _format(spark: SparkSession, name: str) -> int:
    return int(table_properties(spark, name).get(PROPERTY, 0))

"""Open and query tables as files on a disk, for commands that run without Spark."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.common import Job
from pipelines.errors import UserError
from pipelines.formats.champion_captions import NAME as VIEW
from pipelines.formats.tables import (
    DECISIONS,
    EVALUATIONS,
    GENERATED_CAPTIONS,
    INGESTED,
    QUARANTINE,
    SAMPLES,
    TEXTS,
    VERDICTS,
)
from vlm.errors import did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa
    from deltalake import DeltaTable

logger = logging.getLogger(__name__)

MISSING_FILE = re.compile("Object at location (?P<file>.*) not found")
"""Pattern of the message with which `deltalake` reports a data file that does not exist."""

COMMANDS = {
    **dict.fromkeys((SAMPLES.name, TEXTS.name, QUARANTINE.name, INGESTED.name), "ingest"),
    GENERATED_CAPTIONS.name: "caption",
    EVALUATIONS.name: "evaluate",
    VERDICTS.name: "review",
    DECISIONS.name: "promote",
}
"""Dict from each table to the command that writes the table's first rows."""


def open_table(job: Job, name: str, version: int | None) -> DeltaTable:
    """Open a version of a table of the platform, or of a table in a folder. If the version is None, open the latest.

    Raises:
        UserError: the platform's tables cannot be read as files, or the table or the version does not exist.
    """
    from deltalake.exceptions import DeltaError

    from pipelines.formats.delta_files import check_table_format, open_delta

    if "/" in name:
        from pipelines.review.source_pictures import open_source

        latest = open_source(job.platform, job.platform.resolve_table(name))
    else:
        latest = open_delta(_folder(job, name))
        check_table_format(latest)
    if version is None or version == latest.version():
        return latest
    try:
        return open_delta(latest.table_uri, version)
    except DeltaError as error:
        raise UserError(
            f"table {name!r} has no version {version}",
            where=latest.table_uri,
            got=str(error).splitlines()[0] if version < latest.version() else f"version {version}",
            fix=f"choose an earlier version: the latest version is {latest.version()}",
        ) from None


def _folder(job: Job, name: str) -> Path:
    """Return the folder that contains a table of the platform."""
    from pipelines.formats.delta_files import is_supported

    if job.platform.tables is None:
        raise UserError(
            "this command reads only local Delta tables, and cannot read tables of a catalog",
            where=f"platform {job.platform.kind}",
            got=job.platform.table(name),
            fix="query the table with SQL: docs/databricks.md has queries that replace this command",
        )
    if not is_supported(job.platform.tables):
        raise UserError(
            "this command cannot read tables in this home folder",
            where=str(job.platform.root),
            got="a path with one of the characters [ ] \\ ^ | or with a percent escape such as %41",
            fix="rename the home folder",
        )
    names = sorted(path.parent.name for path in job.platform.tables.glob("*/_delta_log"))
    if name not in names:
        job.platform.resolve_table(name)  # raises an error for a table in the working folder
        if name in COMMANDS:
            fix = f"run `lakesight {COMMANDS[name]}` first, which writes the table"
        else:
            fix = f"choose a table, a view or the path of a folder{did_you_mean(name, [*names, *COMMANDS, VIEW])}"
        raise UserError(
            f"there is no table {name!r}",
            where=str(job.platform.tables),
            got=f"tables: {', '.join(names)}" if names else "no tables at all",
            fix=fix,
        )
    return job.platform.tables / name


@contextmanager
def existing_files(name: str, version: int) -> Iterator[None]:
    """Raise a UserError if the block reads a table version and a data file of this version no longer exists.

    Raises:
        UserError: VACUUM has removed files of the version.
    """
    from pyarrow import ArrowInvalid

    try:
        yield
    except ArrowInvalid as error:
        if not (missing := MISSING_FILE.search(str(error))):
            raise
        raise UserError(
            f"version {version} of table {name!r} can no longer be read",
            where=missing["file"][:200],
            got="no such file: VACUUM has removed files of this version",
            fix="omit --version to show the newest version",
        ) from None


@dataclass(frozen=True)
class Relation:
    """A table or the view `champion_captions`, in a form from which SQL can select rows.

    Attributes:
        tables: dict from each table name in `sql` to the Delta table that has this name.
        sql: text that stands for the relation in the FROM clause of a query.
    """

    tables: Mapping[str, DeltaTable]
    sql: str

    def select(self, columns: Sequence[str], where: str, order: str, limit: int | None) -> pa.RecordBatchReader:
        """Read some rows and columns.

        Args:
            columns: names of the columns to read, or an empty list for all columns.
            where: condition in SQL, or an empty text for all rows.
            order: columns to sort by, as in ORDER BY, or an empty text for the order of the files.
            limit: number of rows, or None for all rows.

        Raises:
            UserError: a column does not exist, or the condition or the order is not valid SQL on these columns.
        """
        from deltalake.exceptions import DeltaError

        from pipelines.formats.delta_files import query, quoted_name

        chosen = ", ".join(map(quoted_name, columns)) or "*"
        sql = f"SELECT {chosen} FROM {self.sql}"  # noqa: S608 the condition is the user's own, as in a database client
        sql += f" WHERE ({where})" if where else ""
        sql += f" ORDER BY {order}" if order else ""
        sql += "" if limit is None else f" LIMIT {limit}"
        try:
            return query(self.tables, sql)
        except DeltaError as error:
            raise UserError(
                "the rows cannot be selected",
                where="--columns, --where or --order",
                got=" ".join(str(error).split()),
                fix="write SQL with columns of the table; put names with capital letters or spaces in double quotes",
            ) from None

    def count(self) -> int:
        """Count all rows. For a table, the Delta log has the number of rows, so no data file is read."""
        from pipelines.formats.delta_files import query

        return int(query(self.tables, f"SELECT COUNT(*) AS num_rows FROM {self.sql}").read_all()["num_rows"][0].as_py())  # noqa: S608


def table_relation(table: DeltaTable) -> Relation:
    """Return a relation that selects from one table."""
    return Relation({"shown": table}, "shown")


def champion_captions(job: Job) -> Relation:
    """Return a relation that selects from the view `champion_captions`, at the newest versions of the view's tables.

    Raises:
        UserError: a table does not exist, or lacks a column because an earlier Lakesight version wrote the table. The
            error is also raised if the registry, which knows the champions, does not answer.
    """
    from pipelines.formats.champion_captions import TABLES as VIEW_TABLES
    from pipelines.formats.champion_captions import select

    tables = {name: open_table(job, name, None) for name in VIEW_TABLES}
    existing = {field.name for field in tables[GENERATED_CAPTIONS.name].schema().fields}
    missing = [name for name in GENERATED_CAPTIONS.names if name not in existing]
    if missing:
        raise UserError(
            "the table of captions lacks columns, because an earlier version of Lakesight wrote the table",
            where=GENERATED_CAPTIONS.name,
            got=f"no column {', '.join(missing)}",
            fix=f"run `{job.command('maintain')}` once, which adds the columns and changes no row",
        )
    return Relation(tables, f"({select(champions=_registered_champions(job, tables))}) AS shown")


def _registered_champions(job: Job, tables: Mapping[str, DeltaTable]) -> dict[str, tuple[str, str | None]]:
    """Look up the champion of each captioned model in the model registry (`registered_champion`).

    The result is a dict from the name of a model to number and digest of its champion. A model without a champion in
    the registry is left out, and a warning is logged.
    """
    from pipelines.formats.delta_files import query
    from pipelines.tracking.home_store.copied_version import has_no_registry

    if has_no_registry(job.platform):
        return {}
    sql = f"SELECT DISTINCT model_name FROM {GENERATED_CAPTIONS.name}"  # noqa: S608 the name is a constant
    found: dict[str, tuple[str, str | None]] = {}
    for name in query(tables, sql).read_all()["model_name"].to_pylist():
        champion = registered_champion(job, name)
        if champion is not None:
            found[name] = champion
            continue
        logger.warning(
            "model %s has no champion in the registry, so its captions are shown only if table decisions names a "
            "champion",
            name,
        )
    return found


def registered_champion(job: Job, name: str) -> tuple[str, str | None] | None:
    """Look up the champion of a model in the model registry, which `lakesight caption` also asks.

    Table `decisions` does not record promotions in other home folders. Return number and digest of the champion, or
    None if the registry has no champion of this model. The digest is None for a version that Lakesight 0.1.0
    registered.

    Raises:
        UserError: the registry does not answer or cannot be used. Without an answer, an export could replace captions
            of the champion by captions of an earlier champion.
    """
    from pipelines.tracking.home_store.copied_version import DIGEST_TAG, find_stored_version, has_no_registry

    if has_no_registry(job.platform):
        return None
    stored = find_stored_version(job.platform, name, "champion")
    if stored is not None:
        return stored[0].number, stored[1]
    from pipelines.tracking.registry import CHAMPION, VersionNotFound, resolve

    try:
        champion = resolve(job.platform, name, CHAMPION)
    except VersionNotFound:
        return None
    return champion.version, champion.tags.get(DIGEST_TAG)

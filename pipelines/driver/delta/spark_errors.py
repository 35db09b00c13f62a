"""Translation of Spark errors (invalid SQL of a user, a failed job, a dead Python worker) to errors of this project."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame

from pipelines.errors import StageFailed, UserError
from pipelines.platform import analysed, spark_errors

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

WORKER_DIED = re.compile(
    r"Python worker exited unexpectedly|ExecutorLostFailure|^(?:Caused by: )?MemoryError", re.MULTILINE
)
NAMED_ERROR = re.compile(r"^(?:: |Caused by: )?([\w.]+(?:Error|Exception|Failed|Fault): .+)$", re.MULTILINE)
"""Pattern of a line of a Java or Python stack trace with the class and the message of an exception."""
FILES_REMOVED = re.compile(
    r"FileNotFoundException|FILE_NOT_EXIST|DELTA_FILE_NOT_FOUND|DELTA_CHANGE_DATA_FILE_NOT_FOUND"
)
"""Pattern of Spark's errors for a table version whose files VACUUM has removed."""
RETENTION = "delta.deletedFileRetentionDuration"
"""Table property with the time for which VACUUM keeps the files of old table versions. Delta's default is 7 days. In
addition, Delta 4.1 and later refuses to read versions that are older than this time, except the newest version.
"""
TOO_OLD = re.compile(
    r"DELTA_UNSUPPORTED_TIME_TRAVEL_BEYOND_DELETED_FILE_RETENTION_DURATION|beyond " + re.escape(RETENTION)
)
"""Pattern of Delta's errors for a table version that is older than the retention time of the table."""


def filter_rows(frame: DataFrame, condition: str, *, where: str) -> DataFrame:
    """Return the rows that meet a user's SQL condition, or all rows if the condition is empty.

    Args:
        frame: rows to filter.
        condition: SQL condition on the columns of `frame`.
        where: place where the user wrote the condition, for the error message, such as `data.source.filter`.

    Raises:
        UserError: the condition is not valid SQL on these columns.
    """
    try:
        return analysed(frame.filter(condition)) if condition else frame
    except AnalysisException as error:  # includes ParseException
        raise UserError(
            "the SQL condition cannot be used",
            where=where,
            got=f"{condition} ({str(error).strip().splitlines()[0]})",
            fix=f"write a condition with these columns: {', '.join(frame.columns)}",
        ) from None


@contextmanager
def translate_spark_errors(what: str, *, where: str) -> Iterator[None]:
    """If Spark fails in the block, raise StageFailed from the Spark error, with a message of one paragraph.

    Args:
        what: first sentence of the error message, which says what failed.
        where: name of the table, folder or model, for the error message.

    Raises:
        StageFailed: Spark, an executor or a Python worker failed.
    """
    try:
        yield
    except spark_errors() as error:
        named = NAMED_ERROR.findall(str(error))
        got = named[-1] if named else str(error).strip().partition("\n")[0]
        fix = "correct the cause and run the command again: finished work is kept and no row is duplicated"
        if FILES_REMOVED.search(str(error)):
            fix = (
                "VACUUM has removed files of the table version: run the command again, without a version, to read the "
            )
            fix += "newest version; finished work is kept"
        fix = retention_fix(error) or fix
        raise StageFailed(what, where=where, got=got[:500], fix=fix) from error


def retention_fix(error: Exception) -> str | None:
    """Return how to fix an error that Delta raises because a table version is older than the table's retention time.

    For any other error, return None.
    """
    if not TOO_OLD.search(str(error)):
        return None
    return (
        "Delta reads only the newest version and versions within the retention time of the table: choose one of these "
        f"versions, or set the table property {RETENTION} to a longer time, such as 'interval 720 hours'. VACUUM may "
        "already have removed the files of the version"
    )


def worker_died(error: Exception) -> bool:
    """Return whether Spark failed because a Python worker or an executor ran out of memory or died without an error."""
    return isinstance(error, spark_errors()) and bool(WORKER_DIED.search(str(error)))


def run_or_guard(run: Callable[[], Result], run_guarded: Callable[[], Result]) -> Result:
    """Return the result of `run`, or the result of `run_guarded` if a Python worker dies during `run`.

    `run_guarded` decodes in child processes (`pipelines.executor.crash_guard`) and finds the row that kills a process.
    """
    try:
        return run()
    except Exception as error:
        if not worker_died(error):
            raise
        logger.warning(
            "a Python worker died while it decoded pictures: the pictures are decoded again in child processes"
        )
    return run_guarded()

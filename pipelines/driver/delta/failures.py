"""What fails inside Spark, told in one paragraph: bad SQL of a user, a failed job, a worker that died."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from py4j.protocol import Py4JJavaError  # type: ignore[import-untyped]
from pyspark.errors import AnalysisException, PySparkException
from pyspark.sql import DataFrame

from pipelines.errors import StageFailed, UserError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

DIED = re.compile(r"Python worker exited unexpectedly|ExecutorLostFailure|^(?:Caused by: )?MemoryError", re.MULTILINE)


def filtered(frame: DataFrame, condition: str, *, where: str) -> DataFrame:
    """The rows that meet a user's SQL condition; all of them where it is empty.

    Raises:
        UserError: it is no SQL on these columns. `where` says where it was written.
    """
    try:
        return frame.filter(condition) if condition else frame
    except AnalysisException as error:  # a ParseException is one too
        raise UserError(
            "the condition cannot be used",
            where=where,
            got=f"{condition} ({str(error).strip().splitlines()[0]})",
            fix=f"write SQL on these columns: {', '.join(frame.columns)}",
        ) from None


@contextmanager
def spark_failures(what: str, *, where: str) -> Iterator[None]:
    """Tell what fails in Spark inside as one paragraph; the JVM's and the workers' traces hang on as the cause.

    Raises:
        StageFailed: Spark, an executor or a Python worker failed.
    """
    try:
        yield
    except (PySparkException, Py4JJavaError) as error:
        named = re.findall(r"^(?:: |Caused by: )?([\w.]+(?:Error|Exception|Failed): .+)$", str(error), re.MULTILINE)
        got = named[-1] if named else str(error).strip().partition("\n")[0]
        fix = "correct the cause and run the command again: what is done stays done, nothing is doubled"
        raise StageFailed(what, where=where, got=got[:500], fix=fix) from error


def worker_died(error: Exception) -> bool:
    """Whether Spark failed because a Python worker, or an executor, ended without a word or for want of memory."""
    return isinstance(error, (PySparkException, Py4JJavaError)) and bool(DIED.search(str(error)))


def run_or_guard(run: Callable[[], Result], run_guarded: Callable[[], Result]) -> Result:
    """Return the result of `run`; if a Python worker dies in it, the result of `run_guarded`.

    The guarded variant decodes in child processes (`pipelines.executor.crash_guard`) and isolates the row that kills
    them.
    """
    try:
        return run()
    except Exception as error:
        if not worker_died(error):
            raise
        logger.warning("a Python worker died while it decoded: its rows are decoded again in guarded processes")
    return run_guarded()

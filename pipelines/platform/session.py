"""Functions that hide the differences between classic Spark sessions and Spark Connect sessions (shared compute).

A Connect session is a client of a Spark server. A Connect session has no SparkContext and no JVM, and analyses a query
only when code asks for properties or rows of the query. Outside this module and the start of a classic session
(`local.py`, `build_class_archive.py`), Lakesight uses only methods that classic sessions and Connect sessions share.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pipelines.background_thread import in_background
from pipelines.child_process import READS_URLS, WORKER_VARIABLES

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyspark.sql import DataFrame, SparkSession

MANY_ROWS = 100_000
"""Number of rows in the query with which `default_parallelism` counts tasks. The number is so large that every task
gets rows."""
SHORTAGE_SECONDS = 30.0
"""Time in seconds after which the jobs of a barrier stage are cancelled if not all its tasks can run at once."""
POLL_SECONDS = 1.0
QUERY_LOGGERS = ("DataFrameQueryContextLogger", "SQLQueryContextLogger")
"""Loggers of pyspark that print the Java stack trace of an invalid query, in addition to the query's exception."""


def is_connect(spark: SparkSession) -> bool:
    """Return whether a session is a Spark Connect session. The two classes of sessions have no common base class."""
    from pyspark.sql import SparkSession

    return not isinstance(spark, SparkSession)


def open_remote_session(url: str) -> SparkSession:
    """Return this process's session on the Spark Connect server with an address such as `sc://host:15002`."""
    from pyspark.sql import SparkSession

    return SparkSession.builder.remote(url).getOrCreate()


def register_delta_errors() -> None:
    """Make Connect sessions raise Delta's write conflicts as the exception classes of `delta.exceptions`."""
    import delta.connect  # noqa: F401 (the import registers the classes)


def quiet_loggers() -> None:
    """Hide messages of pyspark that a user cannot act on."""
    from pyspark.logger import PySparkLogger

    logging.getLogger("py4j").setLevel(logging.WARNING)  # py4j logs every closed connection at level INFO
    for name in QUERY_LOGGERS:
        PySparkLogger.getLogger(name).setLevel(logging.CRITICAL)


def jvm_exit_code(seconds: float = 10.0) -> int | None:
    """Return the exit code of the JVM that this process has started, or None if no JVM was started or the JVM answers.

    If a signal has killed the JVM, the exit code is the negative number of the signal. A JVM that is ending closes its
    connections before its exit code is known. This function therefore waits up to `seconds` for the exit code, and
    returns None if the JVM has not ended after this time.
    """
    try:
        from py4j.protocol import Py4JError  # type: ignore[import-untyped]
        from pyspark import SparkContext
    except ImportError:  # a client of Spark Connect without py4j has started no JVM
        return None
    gateway = SparkContext._gateway
    process: subprocess.Popen[bytes] | None = getattr(gateway, "proc", None)
    if gateway is None or process is None:
        return None
    try:
        gateway.jvm.System.nanoTime()
    except (Py4JError, OSError):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(seconds)
    return None


def stop_session(spark: SparkSession) -> None:
    """Stop a session. If the JVM of a classic session has already ended, do nothing."""
    if jvm_exit_code() is None:
        spark.stop()


def spark_errors() -> tuple[type[Exception], ...]:
    """Return the exception classes that a failed query raises. On a client of Spark Connect, py4j may be missing."""
    from pyspark.errors import PySparkException

    try:
        from py4j.protocol import Py4JError
    except ImportError:
        return (PySparkException,)
    return PySparkException, Py4JError


def analysed(frame: DataFrame) -> DataFrame:
    """Analyse a DataFrame and return it, so that a wrong name or a missing table raises an error here and not later.

    Raises:
        AnalysisException: a column, function, table or version does not exist.
    """
    # The server must analyse the query to return this property. The client may derive a schema without the server.
    frame.isStreaming  # noqa: B018
    return frame


def default_parallelism(spark: SparkSession) -> int:
    """Return the number of tasks into which Spark splits a query by default, which is the number of cores.

    With a Connect session, this function runs a query and counts the tasks of the query.
    """
    if not is_connect(spark):
        return int(spark.sparkContext.defaultParallelism)
    from pyspark.sql import functions as F

    return int(spark.range(MANY_ROWS).select(F.spark_partition_id()).distinct().count())


def task_cpus(spark: SparkSession) -> int:
    """Return the number of cores of a Spark task, which is also the number of threads that torch may use in the task.

    The number is the setting `spark.task.cpus`. If the session refuses to return this setting, as serverless compute
    does, the result is the default value 1.
    """
    from pyspark.errors import AnalysisException

    try:
        return int(spark.conf.get("spark.task.cpus", "1") or 1)
    except AnalysisException:
        return 1


def allow_urls(spark: SparkSession) -> None:
    """Give credentials, certificates and proxies to the Python workers of later queries, so that they can open URLs.

    Without this call, Python workers on a laptop have no credentials (`executor/python_daemon.py`). In a workspace,
    this function does nothing, because the cluster decides which environment variables its Python workers have.
    """
    if not is_connect(spark) and WORKER_VARIABLES in spark.sparkContext.environment:
        spark.sparkContext.environment[READS_URLS] = "1"


# ------------------------------------------------------------------------------------------------ barrier stages


def count_slots(spark: SparkSession) -> int:
    """Return how many tasks can run at once. Spark compares this number with the number of tasks of a barrier stage.

    A Connect session reports only the number of cores, not the number of GPUs. If there are fewer GPUs than cores, the
    result is too large. A barrier stage with too many tasks fails, but only after ten minutes.
    """
    if is_connect(spark):
        return default_parallelism(spark) // task_cpus(spark)
    context = spark.sparkContext._jsc.sc()
    profile = context.resourceProfileManager().defaultResourceProfile()
    return int(context.maxNumConcurrentTasks(profile))


@contextlib.contextmanager
def cancel_if_slots_are_lost(spark: SparkSession, tasks: int) -> Iterator[None]:
    """Cancel the Spark jobs started inside the block if the cluster can no longer run `tasks` tasks at once, or if the
    block is interrupted.

    Spark counts its slots (the tasks that can run at once) only when a barrier stage starts. If a host is lost after
    the stage has started, Spark would wait forever for this host. The thread that waits for the stage receives a Spark
    error with the number of remaining slots. A Connect session cannot count slots while a barrier stage occupies them.
    With a Connect session, only a timeout of the job ends the wait for a lost host.

    If a KeyboardInterrupt leaves the block, the tasks of the block must not go on while the command cleans up. pyspark
    cancels jobs only after Ctrl-C, but SIGTERM and a lost lease of a run raise a KeyboardInterrupt too.
    """
    if is_connect(spark):
        yield
        return
    context, tag = spark.sparkContext, f"lakesight-{uuid.uuid4().hex}"

    def watch_slots(ended: threading.Event) -> None:
        enough_at = time.monotonic()
        while not ended.wait(POLL_SECONDS):
            if (slots := count_slots(spark)) >= tasks:
                enough_at = time.monotonic()
            elif time.monotonic() - enough_at > SHORTAGE_SECONDS:
                context._jsc.sc().cancelJobsWithTag(tag, f"executors were lost: {slots} of {tasks} slots are left")

    context.addJobTag(tag)
    try:
        with in_background(watch_slots, "slots"):
            yield
    except KeyboardInterrupt:
        context._jsc.sc().cancelJobsWithTag(tag, "the command was interrupted")
        raise
    finally:
        context.removeJobTag(tag)


def call_in_barrier_stage(
    spark: SparkSession, function: Callable[[], dict[str, object]], tasks: int
) -> list[dict[str, object]]:
    """Call a function in each task of a barrier stage, whose tasks all run at the same time. Return the results.

    With a classic session, this function needs no package on executors. A Connect session has no RDDs, so its
    executors need pyarrow.

    Args:
        spark: Spark session.
        function: function to call; the result of the function must be convertible to JSON.
        tasks: number of tasks.
    """
    if not is_connect(spark):
        rows = spark.sparkContext.parallelize(range(tasks), tasks).barrier()
        return rows.mapPartitions(lambda _: iter([function()])).collect()

    def call(_: Iterator[RecordBatch]) -> Iterator[RecordBatch]:
        from pyarrow import RecordBatch

        yield RecordBatch.from_pydict({"result": [json.dumps(function())]})

    results = spark.range(0, tasks, 1, tasks).mapInArrow(call, "result string", barrier=True).collect()
    return [json.loads(row["result"]) for row in results]

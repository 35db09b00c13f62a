"""Program that starts Spark's Python daemon without the environment variables that Python workers do not need.

    python -m pipelines.executor.python_daemon MODULE

Spark starts its Python daemon with all variables of the JVM, and the JVM has all variables of the driver, such as
access tokens. Python workers decode pictures that are not trusted, and are forks of the daemon. This program replaces
itself by Spark's daemon (`pyspark.daemon`), so that not even the memory of a worker contains the other variables.
"""

from __future__ import annotations

import os
import re
import sys

from pipelines.child_process import READS_URLS, STORE_VARIABLES, WORKER_VARIABLES, drop_other_variables

SPARK_VARIABLES = (
    "PYTHON_WORKER_FACTORY_[A-Z_]+",
    "SPARK_(HOME|LOCAL_IP|LOCAL_DIRS|EXECUTOR_DIRS|BUFFER_SIZE|REUSE_WORKER|AUTH_SOCKET_TIMEOUT|PREFER_IPV6|TESTING"
    "|PYTHON_RUNTIME|JOB_ARTIFACT_UUID|HIDE_TRACEBACK|SIMPLIFIED_TRACEBACK)",
    "PYSPARK_(PYTHON|EXECUTOR_MEMORY_MB|PLANNER_MEMORY_MB|ENABLE_NAMEDTUPLE_PATCH|PANDAS_SQL_LEGACY|YM_INTERVAL_LEGACY)",
    "ARROW_PRE_0_15_IPC_FORMAT",
)
"""Patterns of the environment variables that Spark's Python code reads."""


def main() -> None:
    """Remove the environment variables that Python workers do not need, and execute Spark's daemon."""
    given = map(re.escape, os.environ.get(WORKER_VARIABLES, "").split(","))
    stores = [STORE_VARIABLES] if READS_URLS in os.environ else []
    drop_other_variables(*SPARK_VARIABLES, *given, *stores)
    os.execve(sys.executable, [sys.executable, "-m", "pyspark.daemon", *sys.argv[1:]], dict(os.environ))  # noqa: S606


if __name__ == "__main__":
    main()

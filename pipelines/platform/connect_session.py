"""Start of a session on a Spark Connect server that a user runs, with checks that the stages can work on this server.

The session has no JVM on this machine. The tables stay in the home folder, which the server must see under the same
path.
"""

from __future__ import annotations

import logging
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.config import SparkConfig
from pipelines.errors import UserError
from pipelines.platform.session import (
    call_in_barrier_stage,
    open_remote_session,
    quiet_loggers,
    register_delta_errors,
    spark_errors,
)
from pipelines.platform.spark_launch import check_address

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

logger = logging.getLogger(__name__)

DEFAULT_PORT = 15002
DELTA_EXTENSION = "io.delta.sql.DeltaSparkSessionExtension"


def open_connect_session(config: SparkConfig, root: Path) -> SparkSession:
    """Open a session on the Spark Connect server whose address is the setting `master`, such as `sc://host:15002`.

    Raises:
        UserError: the client of Spark Connect is not installed, the server does not answer, the server refuses a
            setting, or the server has no Delta Lake, no Lakesight or no access to the home folder.
    """
    try:
        import grpc  # type: ignore[import-untyped]  # noqa: F401 (pyspark's own message about missing packages is long)

        quiet_loggers()
        register_delta_errors()
    except ImportError:
        raise UserError(
            "the client of Spark Connect is not installed", where=sys.executable, fix="pip install 'pyspark[connect]'"
        ) from None
    check_address(config.master, DEFAULT_PORT, "the Spark Connect server")
    logger.info("opening a session on the Spark Connect server %s", config.master)
    try:
        spark = open_remote_session(config.master)
        extensions = spark.conf.get("spark.sql.extensions", "") or ""
    except spark_errors() as error:
        raise _refused("the Spark Connect server refuses a session", config, error) from None
    if DELTA_EXTENSION not in extensions:
        raise UserError(
            "the Spark Connect server has no Delta Lake",
            where=config.master,
            got=f"spark.sql.extensions={extensions or 'nothing'}",
            fix="start the server with Delta's jar and settings (docs/training.md shows the command)",
        )
    _apply_settings(spark, config)
    _check_executors(spark, config, root)
    return spark


def _apply_settings(spark: SparkSession, config: SparkConfig) -> None:
    """Apply the settings of the user, and our settings that a session can change.

    Raises:
        UserError: the server refuses a setting. The error does not contain the value, which may be a secret.
    """
    own = {"spark.sql.session.timeZone": "UTC", "spark.sql.shuffle.partitions": str(config.shuffle_partitions)}
    for name, value in (own | config.conf).items():
        try:
            spark.conf.set(name, value)
        except spark_errors():
            raise UserError(
                "the Spark Connect server refuses a setting",
                where=f"platform.spark.conf: {name}",
                got="a setting that a session cannot change",
                fix="give this setting to the server when you start the server, and remove it from platform.spark.conf",
            ) from None


def _check_executors(spark: SparkSession, config: SparkConfig, root: Path) -> None:
    """Check in one task of the server that Lakesight is installed there and that the home folder is visible.

    Raises:
        UserError: the task failed, or Lakesight or the home folder is missing.
    """
    probe = root / f".probe-{uuid.uuid4().hex}"
    name = str(probe)

    def describe() -> dict[str, object]:
        import importlib.util
        import os

        return {"package": importlib.util.find_spec("pipelines") is not None, "home": os.path.exists(name)}  # noqa: PTH110

    probe.touch()
    try:
        (found,) = call_in_barrier_stage(spark, describe, 1)
    except spark_errors() as error:
        raise _refused("the Spark Connect server cannot run a Python task", config, error) from None
    finally:
        probe.unlink()
    if not found["package"]:
        raise UserError(
            "Lakesight is not installed on the Spark Connect server",
            where=config.master,
            got="its Python tasks cannot import the package pipelines",
            fix="install the same version of Lakesight into the Python that the server uses (PYSPARK_PYTHON)",
        )
    if not found["home"]:
        raise UserError(
            "the Spark Connect server cannot see the Lakesight home folder",
            where=config.master,
            got=f"no folder {root} on the server",
            fix="set LAKESIGHT_HOME to a folder that this machine and the server have under the same path",
        )


def _refused(what: str, config: SparkConfig, error: Exception) -> UserError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return UserError(
        what,
        where=config.master,
        got=(lines or [type(error).__name__])[0][:500],
        fix="read the server's log; the server needs the Spark version and the Python version of this machine",
    )

"""Construction of the `Platform` for a Databricks workspace."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.config import DatabricksPlatformConfig
from pipelines.platform.platform import Launch, Platform
from pipelines.platform.session import is_connect, quiet_loggers, register_delta_errors

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def databricks(config: DatabricksPlatformConfig) -> Platform:
    """Describe a workspace: its running Spark session, tables in Unity Catalog, a Volume, and its MLflow server."""
    return Platform(
        kind="databricks",
        open_spark=_running_session,
        namespace=f"{config.catalog}.{config.schema_}",
        root=Path("/Volumes") / config.catalog / config.schema_ / config.volume,
        remote=True,
        tables=None,
        launch=Launch(config.ranks, local_mode=False, use_gpu=config.use_gpu),
        tracking_uri="databricks",
        registry_uri="databricks-uc",
        model_prefix=f"{config.catalog}.{config.schema_}.",
        experiment_prefix="/Shared/lakesight/",
        shared_experiment=config.experiment,
    )


def app_port() -> int | None:
    """Return the port on which a Databricks App must listen, or None if this process is not an app."""
    port = os.environ.get("DATABRICKS_APP_PORT")
    return int(port) if port else None


def _running_session() -> SparkSession:
    """Return the Spark session that the workspace has started, which may be a Spark Connect session."""
    from pyspark.sql import SparkSession

    spark = SparkSession.getActiveSession() or SparkSession.builder.getOrCreate()
    quiet_loggers()
    if is_connect(spark):
        register_delta_errors()
    return spark

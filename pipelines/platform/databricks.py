"""A Databricks workspace as a platform: the running session, Unity Catalog, a Volume and the workspace's MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.config import DatabricksPlatformConfig
from pipelines.platform.platform import Launch, Platform

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def databricks(config: DatabricksPlatformConfig) -> Platform:
    """Describe a workspace: its running session, Unity Catalog tables, a Volume, and the workspace's MLflow."""
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
    )


def _running_session() -> SparkSession:
    """Return the session that the workspace has started."""
    from pyspark.sql import SparkSession

    return SparkSession.getActiveSession() or SparkSession.builder.getOrCreate()

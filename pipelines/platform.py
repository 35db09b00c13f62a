"""The seam between a laptop and a workspace: a frozen dataclass of answers with two constructors.

Every question whose answer differs between the two is asked here, and this is the only file that knows that Databricks
exists. The choice is the user's (`--platform`), never sniffed from the environment.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipelines.config import DatabricksPlatformConfig, LocalPlatformConfig, PlatformConfig
from pipelines.errors import UserError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

FolderKind = Literal["shards", "runs", "models", "reports", "demo"]


@dataclass(frozen=True)
class Launch:
    """How ranks start: how many, beside the driver or on executors, and on what."""

    ranks: int
    local_mode: bool
    use_gpu: bool


@dataclass(frozen=True)
class Platform:
    """Answers to every question that a laptop and a workspace answer differently.

    Attributes:
        kind: the name given to `--platform`.
        open_spark: returns the Spark session (starts it locally).
        namespace: what a table name is prefixed with.
        root: the folder that holds every other folder.
        tables: folder of the Delta tables as plain files, where there is one; None where a catalog owns them.
        launch: how ranks start.
        tracking_uri: MLflow tracking server.
        registry_uri: MLflow model registry.
        model_prefix: what a registered model's name is prefixed with.
        experiment_prefix: what an experiment's name is prefixed with.
    """

    kind: Literal["local", "databricks"]
    open_spark: Callable[[], SparkSession]
    namespace: str
    root: Path
    tables: Path | None
    launch: Launch
    tracking_uri: str
    registry_uri: str
    model_prefix: str
    experiment_prefix: str

    def table(self, name: str) -> str:
        """Full name of a table."""
        return f"{self.namespace}.{name}"

    def folder(self, kind: FolderKind) -> Path:
        """Folder of files of one kind. It is created by whoever writes into it first."""
        return self.root / kind

    def model_name(self, run: str) -> str:
        """Registered model of a run's name."""
        return f"{self.model_prefix}{run}"

    def experiment(self, run: str) -> str:
        """MLflow experiment of a run's name."""
        return f"{self.experiment_prefix}{run}"


def open_platform(config: PlatformConfig) -> Platform:
    """The platform a resolved config names."""
    return local(config) if isinstance(config, LocalPlatformConfig) else databricks(config)


def home() -> Path:
    """Where a laptop keeps everything: $LAKESIGHT_HOME, or .lakesight in the working directory."""
    return Path(os.environ.get("LAKESIGHT_HOME") or ".lakesight").absolute()


def local(config: LocalPlatformConfig) -> Platform:
    """A laptop: embedded Spark, Delta and SQLite MLflow, all under `home()`.

    Raises:
        UserError: the home folder cannot be created or written to.
    """
    root = home()
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            "the Lakesight home folder cannot be written to",
            where=str(root),
            got=str(error.strerror or error),
            fix="set LAKESIGHT_HOME to a folder you may write to",
        ) from None
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"
    return Platform(
        kind="local",
        open_spark=lambda: _local_session(config, root),
        namespace="lakesight",
        root=root,
        tables=root / "warehouse",
        launch=Launch(config.ranks, local_mode=config.spark.master.startswith("local["), use_gpu=False),
        tracking_uri=uri,
        registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or uri,
        model_prefix="",
        experiment_prefix="lakesight/",
    )


def databricks(config: DatabricksPlatformConfig) -> Platform:
    """A workspace: the running session, Unity Catalog tables, a Volume, the workspace's MLflow."""
    return Platform(
        kind="databricks",
        open_spark=_running_session,
        namespace=f"{config.catalog}.{config.schema_}",
        root=Path("/Volumes") / config.catalog / config.schema_ / config.volume,
        tables=None,
        launch=Launch(config.ranks, local_mode=False, use_gpu=config.use_gpu),
        tracking_uri="databricks",
        registry_uri="databricks-uc",
        model_prefix=f"{config.catalog}.{config.schema_}.",
        experiment_prefix="/Shared/lakesight/",
    )

"""What a laptop and a workspace answer differently: one frozen dataclass, made by `local` or `databricks`.

Every question whose answer depends on where a run happens is a field or a method here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

FolderKind = Literal["shards", "runs", "models", "reports", "staged", "demo"]


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
        remote: whether its files are on a network, where every reading costs: what many processes read is copied first.
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
    remote: bool
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


def shown_uri(uri: str) -> str:
    """A URI, or a message with one, without the password it may hold: before the host, or behind a question mark."""
    return re.sub(r"\?\S*", "", re.sub(r"//[^/\s]*@", "//", uri))

"""Everything that differs between a laptop and a Databricks workspace, in one frozen dataclass.

`local` and `databricks` are its two constructors. Code that depends on where a run happens asks a `Platform`.
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
    """How ranks are launched.

    Attributes:
        ranks: number of ranks.
        local_mode: True to start ranks on the driver's host, False to start them on executors.
        use_gpu: True for one GPU per rank, False for CPUs.
    """

    ranks: int
    local_mode: bool
    use_gpu: bool


@dataclass(frozen=True)
class Platform:
    """Where a run happens.

    Attributes:
        kind: the value of `--platform`.
        open_spark: returns the Spark session; on a laptop it starts one.
        namespace: prefix of table names, without the dot.
        root: folder that holds all other folders.
        remote: True if `root` is on a network. Files that many processes read are then copied to local disk first.
        tables: folder of the Delta tables as plain files; None if a catalog manages them.
        launch: how ranks are launched.
        tracking_uri: MLflow tracking server.
        registry_uri: MLflow model registry.
        model_prefix: prefix of registered models' names.
        experiment_prefix: prefix of experiments' names.
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
        """Return the full name of a table."""
        return f"{self.namespace}.{name}"

    def folder(self, kind: FolderKind) -> Path:
        """Return the folder for one kind of files. Whoever writes into it creates it."""
        return self.root / kind

    def model_name(self, run: str) -> str:
        """Return the name of a run's registered model."""
        return f"{self.model_prefix}{run}"

    def experiment(self, run: str) -> str:
        """Return the name of a run's MLflow experiment."""
        return f"{self.experiment_prefix}{run}"


def redact_uri(uri: str) -> str:
    """Remove passwords from a URI or from a message that contains one: user information and query string."""
    return re.sub(r"\?\S*", "", re.sub(r"//[^/\s]*@", "//", uri))

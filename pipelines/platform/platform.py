"""The class `Platform`, whose attributes say what differs between a laptop and a Databricks workspace.

The functions `local` and `databricks` construct a `Platform`. Code that depends on where a run happens uses the
properties of the `Platform`.
"""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipelines.errors import UserError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

TABLE_IN_FOLDER = re.compile(r"delta\.`(?P<path>[^`]+)`")
"""Pattern of the SQL name of a Delta table that is not in a catalog: the name contains the path of the table's
folder."""

FolderKind = Literal["shards", "runs", "models", "reports", "staged", "demo"]


@dataclass(frozen=True)
class Launch:
    """Settings with which TorchDistributor launches ranks.

    Attributes:
        ranks: number of ranks.
        local_mode: whether ranks start on the driver's host; if false, ranks start on executors.
        use_gpu: whether each rank gets a GPU; if false, ranks use CPUs.
    """

    ranks: int
    local_mode: bool
    use_gpu: bool


@dataclass(frozen=True)
class Platform:
    """Description of the place where a run happens.

    If `root` is on a network, files that many processes read are copied to local disk.

    Attributes:
        kind: value of the option `--platform`: local or databricks.
        open_spark: function that returns the Spark session. On a laptop, its first call starts the session, or opens
            the session on a Spark Connect server.
        namespace: prefix of table names without the last dot, such as `catalog.schema`.
        root: folder that holds all other folders.
        remote: whether `root` is on a network.
        tables: folder of the Delta tables as plain files, or None if a catalog manages the tables.
        launch: settings with which ranks are launched.
        tracking_uri: URI of the MLflow tracking server.
        registry_uri: URI of the MLflow model registry.
        model_prefix: prefix of the names of registered models.
        experiment_prefix: prefix of the names of MLflow experiments.
        shared_experiment: name of the MLflow experiment that all run configs and stages share. If None, each run config
            has its own experiment, and each stage that logs its own runs has its own experiment too.
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
    shared_experiment: str | None

    def table(self, name: str) -> str:
        """Return the full name of a table."""
        return f"{self.namespace}.{name}"

    def resolve_table(self, text: str) -> str:
        """Return the full name of a table, which a user has given as `table`, `schema.table` or the path of a folder.

        A text with a slash is a path, such as `shop/products`, `/data/products` or `s3a://bucket/products`.

        Raises:
            UserError: no table of this platform has this name, but a Delta table in the working folder has this name.
        """
        if "/" in text and not text.startswith("delta."):
            return f"delta.`{text if '://' in text else os.path.normpath(Path(text).expanduser().absolute())}`"
        name = text if "." in text else self.table(text)
        location = self.table_location(name)
        own = location is not None and Path(location, "_delta_log").is_dir()
        if self.tables is not None and not own and Path(text, "_delta_log").is_dir():
            raise UserError(
                f"there is no table {text!r}",
                where=str(self.tables),
                got="a name without a slash, which is not the path of a folder",
                fix=f"write ./{text} for the Delta table in the working folder",
            )
        return name

    def table_location(self, name: str) -> str | None:
        """Return the folder or URL of a Delta table, given its full name, or None if a catalog manages the table."""
        schema, _, table = name.rpartition(".")
        if in_folder := TABLE_IN_FOLDER.fullmatch(name):
            return in_folder["path"]
        return str(self.tables / table) if self.tables is not None and schema == self.namespace else None

    def folder(self, kind: FolderKind) -> Path:
        """Return the folder for one kind of files, such as `shards` or `reports`.

        The folder may be missing, so code that writes files must first create the folder.
        """
        return self.root / kind

    def model_name(self, run: str) -> str:
        """Return the name of a run's registered model."""
        return f"{self.model_prefix}{run}"

    def experiment(self, run: str) -> str:
        """Return the name of the MLflow experiment of a run config, or of a stage that logs its own runs."""
        return self.shared_experiment or f"{self.experiment_prefix}{run}"


def sqlite_uri(file: Path) -> str:
    """Return the URI of an SQLite store.

    Percent signs and question marks in the path are escaped: SQLAlchemy decodes percent escapes and ends the path at a
    question mark. The URI of an escaped path begins with `sqlite+pysqlite:///`. With `sqlite:///`, MLflow would create
    a folder with the escaped name.
    """
    escaped = str(file).replace("%", "%25").replace("?", "%3F")
    return f"sqlite:///{file}" if escaped == str(file) else f"sqlite+pysqlite:///{escaped}"


def user_name() -> str:
    """Return the name of this user, or `user UID` if the user id has no name, as in many containers."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # Python 3.12 and earlier raise KeyError for an id without a name
        return f"user {os.getuid()}"

"""Checks of `lakesight doctor --platform databricks`, which is the first task of each job of the bundle.

The checks run without a GPU, before a GPU cluster starts. The checks do what later tasks do: they write to the
Volume and the tables, find or create the experiment and the registered model, and open the input of later tasks.
"""

from __future__ import annotations

import base64
import http.client
import mmap
import os
import re
import shutil
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from jobs.check import DoctorCheck
from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.platform import Platform, spark_errors

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from pipelines.driver.caption.source_table import SourceTable

MIN_RUNTIME = 17
"""Oldest supported major version of the Databricks runtime, which is the first version with Spark 4."""
SERVERLESS = "client."
"""Prefix of the runtime version on serverless compute."""
MIN_ENVIRONMENT = 4
"""Oldest supported version of the environment of serverless compute, which is the first version with Spark 4."""

RUNTIME_MODULES = ("pyspark", "delta", "mlflow", "torch", "pandas")
WHEEL_MODULES = ("deltalake", "pyarrow", "safetensors", "tokenizers")
INDEX_TIMEOUT_SECONDS = 10
FIRST_ROWS = 20
"""Number of rows of a table in which the check looks for paths in the picture column."""
ML_RUNTIME = "set cpu_runtime and gpu_runtime of the bundle to an ML runtime, such as 18.x-cpu-ml-scala2.13"
ENVIRONMENT = 'set environment_version in the bundle variable cpu_compute to "4", and keep mlflow in the dependencies'
LIBRARIES = "add the wheel of Lakesight to the libraries of the task, and let the cluster reach a package index"


class Inputs(NamedTuple):
    """Data that the later tasks of a job will read, from the parameters of the job.

    Attributes:
        source_path: path that `ingest` will read, or an empty text for the source of the data config. None if no task
            ingests.
        table: table that `caption` will read. None if no task captions.
        id_column: column of this table with a unique id for each row.
        image_column: column of this table with the pictures.
        where: SQL condition on the rows of this table; an empty condition selects all rows.
        image_root: folder or URL of the pictures if `image_column` holds their paths or URLs, or None.
    """

    source_path: str | None = None
    table: str | None = None
    id_column: str = "image_id"
    image_column: str = "image"
    where: str = ""
    image_root: str | None = None


NO_INPUTS = Inputs()


def check_workspace(config: RunConfig, platform: Platform, inputs: Inputs = NO_INPUTS) -> Iterator[DoctorCheck]:
    """Run the checks of a workspace, and yield the result of each check.

    If a module is missing, the checks that need the modules are left out. Serverless compute runs no task that needs
    torch, so torch may be missing there.

    Args:
        config: config of the run. If the path in `inputs` is not empty, the source in this config has this path.
        platform: the workspace.
        inputs: data that later tasks will read.
    """
    version = os.environ.get("DATABRICKS_RUNTIME_VERSION", "")
    serverless = version.startswith(SERVERLESS)
    yield check_runtime(version)
    fix = ENVIRONMENT if serverless else ML_RUNTIME
    modules = [check_module(name, fix) for name in RUNTIME_MODULES if not (serverless and name == "torch")]
    modules += [check_module(name, LIBRARIES) for name in WHEEL_MODULES]
    yield from modules
    yield check_volume(platform.root)
    if any(check.status == "fail" for check in modules):
        return  # the remaining checks need these modules
    yield check_tables(platform)
    yield from check_mlflow(config, platform)
    if inputs.source_path is not None:
        yield check_source(config, platform)
    if inputs.table:
        yield check_captioned_table(platform, inputs)
    yield check_package_index(os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple/"))


def check_runtime(version: str) -> DoctorCheck:
    """Check the version of the Databricks runtime, such as `18.0`, or of a serverless environment (`client.4.9`)."""
    serverless = version.startswith(SERVERLESS)
    major = re.match(r"\d+", version.removeprefix(SERVERLESS))
    if major and int(major[0]) >= (MIN_ENVIRONMENT if serverless else MIN_RUNTIME):
        return DoctorCheck(name="runtime", status="ok", found=version)
    fix = ENVIRONMENT if serverless else ML_RUNTIME
    return DoctorCheck(name="runtime", status="fail", found=version or "not a Databricks cluster", fix=fix)


def check_module(name: str, fix: str) -> DoctorCheck:
    """Check that a module can be imported, and report its version.

    The version is read from the module itself, because a runtime may have installed the module as part of another
    distribution, such as mlflow-skinny.
    """
    try:
        module = import_module(name)
    except ImportError as error:
        return DoctorCheck(name=name, status="fail", found=str(error), fix=fix)
    return DoctorCheck(name=name, status="ok", found=getattr(module, "__version__", "installed"))


def check_volume(root: Path) -> DoctorCheck:
    """Write, rename, read, map and remove a file in the folder `root` of the Volume, and rename a folder."""
    folder = root / f".preflight-{uuid.uuid4().hex}"
    content = b"lakesight"
    step = "create a folder"
    try:
        folder.mkdir()
        step = "write a file"
        written, renamed = folder / "written", folder / "renamed"
        written.write_bytes(content)
        step = "rename a file"
        written.rename(renamed)
        step = "map a file"
        private = {"flags": mmap.MAP_PRIVATE, "prot": mmap.PROT_READ}
        with renamed.open("rb") as file, mmap.mmap(file.fileno(), 0, **private) as view:
            if view[:] != content:
                raise OSError(f"the file contains {view[:]!r}, expected {content!r}")
        step = "rename a folder"
        folder = folder.rename(folder.with_name(f"{folder.name}-renamed"))
        step = "remove a folder"
        shutil.rmtree(folder)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        return DoctorCheck(
            name="volume",
            status="fail",
            found=f"{root}: cannot {step}: {error.strerror or error}",
            fix="deploy the bundle, which creates the Volume, and grant READ VOLUME and WRITE VOLUME on it",
        )
    return DoctorCheck(name="volume", status="ok", found=str(root))


def check_tables(platform: Platform) -> DoctorCheck:
    """Find or create the tables, read the history of one table, and write to each table without changing it.

    A user who does not own a table needs the permission MODIFY to write to it. A DELETE that matches no row needs this
    permission too, and makes no table version.
    """
    from pipelines.driver.delta.tables import ensure_tables
    from pipelines.driver.delta.versions import read_versions
    from pipelines.formats.tables import TABLES

    fix = "choose an existing catalog, deploy the bundle, and grant USE CATALOG, USE SCHEMA and CREATE TABLE"
    try:
        spark = platform.open_spark()
        ensure_tables(spark, platform)
        read_versions(spark, platform, "preflight")
        fix = "grant SELECT and MODIFY on this table, or let the user of the jobs own the table"
        for table in TABLES:
            spark.sql(f"DELETE FROM {platform.table(table.name)} WHERE false")  # noqa: S608 names of our own tables
    except spark_errors() as error:
        found = f"{platform.namespace}: {(str(error).splitlines() or [type(error).__name__])[0][:300]}"
        return DoctorCheck(name="tables", status="fail", found=found, fix=fix)
    return DoctorCheck(name="tables", status="ok", found=platform.namespace)


def check_source(config: RunConfig, platform: Platform) -> DoctorCheck:
    """Check that `ingest` can read the source of the run."""
    from pipelines.driver.ingest.sources.open import check_access

    where = config.data.source.where
    try:
        check_access(platform.open_spark(), config.data)
    except UserError as error:
        fix = f"{error.fix}; or grant READ VOLUME or SELECT on the source"
        return DoctorCheck(name="source", status="fail", found=f"{where}: {error.what}: {error.got}", fix=fix)
    except spark_errors() as error:
        found = f"{where}: {str(error).partition(chr(10))[0][:300]}"
        return DoctorCheck(name="source", status="fail", found=found, fix="grant SELECT on the table of the source")
    return DoctorCheck(name="source", status="ok", found=where)


def check_captioned_table(platform: Platform, inputs: Inputs) -> DoctorCheck:
    """Check that `caption` can read the table and the columns that the job names.

    No row is read for this check. Only if the pictures may be paths, `_find_path` reads a few rows.
    """
    from pipelines.driver.caption.source_table import open_source_table
    from pipelines.executor.ingest.records.pictures.root import absolute_location

    name = platform.resolve_table(inputs.table or "")
    try:
        columns = (inputs.id_column, inputs.image_column)
        root = None if inputs.image_root is None else absolute_location(inputs.image_root)
        spark = platform.open_spark()
        source = open_source_table(spark, platform, name, None, columns=columns, where=inputs.where, image_root=root)
    except UserError as error:
        found = f"{error.what}: {error.got}"
        fix = f"{error.fix}; or grant SELECT on the table"
        return DoctorCheck(name="captioned", status="fail", found=found, fix=fix)
    except spark_errors() as error:
        found = f"{name}: {str(error).partition(chr(10))[0][:300]}"
        return DoctorCheck(name="captioned", status="fail", found=found, fix="grant SELECT on the table")
    try:
        path = None if root is not None else _find_path(spark, source, inputs.image_column)
    except spark_errors() as error:
        found = f"{name}: the first rows cannot be read: {str(error).partition(chr(10))[0][:300]}"
        return DoctorCheck(name="captioned", status="warn", found=found, fix="correct the cause that Spark reports")
    if path is None:
        return DoctorCheck(name="captioned", status="ok", found=name)
    found = f"column {inputs.image_column} of {name} has paths or URLs, such as {path[:100]!r}"
    fix = "give the folder or URL of the picture files: --image-root (parameter `options` of the job caption)"
    return DoctorCheck(name="captioned", status="warn", found=found, fix=fix)


def _find_path(spark: SparkSession, source: SourceTable, column: str) -> str | None:
    """Return a path or URL from the first rows of a column of texts, or None if there is none.

    The condition of the job is left out, because Spark would read the whole table to find a few rows that meet it. The
    texts are cut, because a base64 text may have many megabytes.
    """
    from pipelines.driver.delta.settings import bounded_batches
    from vlm.image import MAX_PATH, looks_like_path

    table = spark.read.table(source.name)
    if dict(source.rows.dtypes)["image"] != "string":
        return None
    with bounded_batches(spark):
        rows = table.select(table[column].substr(1, MAX_PATH + 1).alias("start")).limit(FIRST_ROWS).collect()
    return next((row["start"] for row in rows if row["start"] and looks_like_path(row["start"])), None)


def check_mlflow(config: RunConfig, platform: Platform) -> Iterator[DoctorCheck]:
    """Find or create the run's experiment and its registered model.

    If the tracking server does not answer, the check only warns, because the server may answer later. If the tracking
    server refuses the request, the check fails.
    """
    from pipelines.tracking.outage import TrackingDown
    from pipelines.tracking.registry import ensure_model
    from pipelines.tracking.server import ensure_experiment

    parts: tuple[tuple[str, str, Callable[[], object]], ...] = (
        ("experiment", platform.experiment(config.name), lambda: ensure_experiment(platform, config.name)),
        ("model", platform.model_name(config.name), lambda: ensure_model(platform, platform.model_name(config.name))),
    )
    for name, target, ensure in parts:
        try:
            ensure()
        except UserError as error:
            status: Literal["warn", "fail"] = "warn" if isinstance(error, TrackingDown) else "fail"
            yield DoctorCheck(name=name, status=status, found=f"{target}: {error.got or error.what}", fix=error.fix)
        else:
            yield DoctorCheck(name=name, status="ok", found=target)


def check_package_index(url: str) -> DoctorCheck:
    """Send a request to the package index, and warn if the request fails.

    All modules were found, so this cluster has already installed the wheel's dependencies. A workspace may install
    packages from an index that is named only in the settings of the workspace. A failed request is therefore no reason
    to fail.

    User and password of the URL are sent to the index only, and not to the target of a redirection, as in pip.
    """
    shown = re.sub(r"//[^/\s]*@", "//", url)
    try:
        request = urllib.request.Request(shown, method="HEAD")  # noqa: S310 index of pip
        if user := urlsplit(url).netloc.rpartition("@")[0]:
            name, _, password = user.partition(":")
            encoded = base64.b64encode(f"{unquote(name)}:{unquote(password)}".encode()).decode("ascii")
            request.add_unredirected_header("Authorization", f"Basic {encoded}")
        with urllib.request.urlopen(request, timeout=INDEX_TIMEOUT_SECONDS):  # noqa: S310 index of pip
            return DoctorCheck(name="index", status="ok", found=shown)
    except (OSError, http.client.HTTPException, ValueError) as error:
        fix = (
            "nothing, if the workspace installs packages from another index. Otherwise allow egress to the package "
            "index, or set PIP_INDEX_URL of the clusters to an index in your network"
        )
        return DoctorCheck(name="index", status="warn", found=f"{shown}: {error}", fix=fix)

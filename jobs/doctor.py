"""`lakesight doctor`: check that this machine can run Lakesight, and print a fix for each problem."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import urllib.error
import urllib.request
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from jobs.check import DoctorCheck
from jobs.common import (
    MIN_FREE_BYTES,
    JsonOption,
    PlatformOption,
    RunOption,
    SetOption,
    WhereOption,
    open_output,
)
from jobs.preflight import NO_INPUTS, Inputs, check_workspace
from pipelines.config import DatabricksPlatformConfig, LocalPlatformConfig, RunConfig, load_run
from pipelines.errors import StageFailed, UserError
from pipelines.platform import Platform, check_java, open_platform
from pipelines.platform.jars import delta_artifact

RECOMMENDED_FREE_BYTES = 5 * 2**30
RECOMMENDED_MEMORY_BYTES = 6 * 2**30
MAVEN_TIMEOUT_SECONDS = 5
INSTALL = "pip install 'lakesight[local]'"
PACKAGES = ("pyspark", "delta-spark", "deltalake", "mlflow", "torch", "pyarrow")


COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
CaptionOptions = Annotated[
    str,
    typer.Option(
        "--caption-options", help="Further options with which caption reads --table, as in a shell.", metavar="TEXT"
    ),
]


def doctor(
    *,
    source_path: Annotated[
        str | None,
        typer.Option(
            "--source-path",
            help="In a workspace, check that ingest can read this path. If empty: the source of the run.",
            metavar="PATH",
        ),
    ] = None,
    table: Annotated[
        str | None,
        typer.Option("--table", help="In a workspace, check that caption can read this table.", metavar="TABLE"),
    ] = None,
    id_column: Annotated[
        str, typer.Option("--id-column", help="Column of --table with a unique id for each row.", metavar="COLUMN")
    ] = "image_id",
    image_column: Annotated[
        str, typer.Option("--image-column", help="Column of --table with the pictures.", metavar="COLUMN")
    ] = "image",
    where: WhereOption = "",
    caption_options: CaptionOptions = "",
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check this machine or workspace and print fixes.

    On a laptop, the command checks Java, Python packages, Delta's jars, Spark's task slots, GPU, memory, disk space and
    the home folder. If no check fails, the command then starts Spark, and merges a row into a temporary Delta table.

    In a workspace, the command checks the runtime, packages, Volume, tables, experiment, model registry and package
    index. The command creates the tables, the experiment and the registered model if they do not exist. With
    --source-path, the command also checks that a later ingest can read its input. With --table, the command also checks
    that a later caption can read this table.

    \b
    Examples:
      lakesight doctor
      lakesight doctor --platform databricks --set platform.catalog=main ...
    """
    with open_output(as_json=as_json) as output:
        path = [f"data.source.path={source_path}"] if source_path else []
        config = load_run(run, platform=platform, overrides=[*(overrides or ()), *path])
        inputs = Inputs(source_path, table, id_column, image_column, where)
        checks = run_checks(config, with_caption_options(inputs, caption_options) if caption_options else inputs)
        for check in checks:
            output.line(check.name, check.found, mark=f"{check.status:<5} ", colour=COLOURS[check.status])
            if check.fix:
                output.line("", f"      fix: {check.fix}")
        failed = [check.name for check in checks if check.status == "fail"]
        output.report({"ready": not failed, "checks": checks})
        if failed:
            place = "machine" if config.platform.kind == "local" else "workspace"
            raise StageFailed(f"this {place} is not ready", got=", ".join(failed), fix="apply the fixes printed above")


def with_caption_options(inputs: Inputs, options: str) -> Inputs:
    """Return the inputs of a later `caption` whose command has further options.

    Raises:
        UserError: a quotation mark in the options is not closed.
        UsageError: `caption` has no such option, or refuses its value.
    """
    from jobs.cli import LazyCommands

    columns = {"table": inputs.table or "", "id-column": inputs.id_column, "image-column": inputs.image_column}
    words = [f"--{name}={value}" for name, value in (columns | {"where": inputs.where, "options": options}).items()]
    given = LazyCommands()["caption"].make_context("caption", words).params
    names = ("table", "id_column", "image_column", "where", "image_root")
    return inputs._replace(**{name: given[name] for name in names})


def run_checks(config: RunConfig, inputs: Inputs = NO_INPUTS) -> list[DoctorCheck]:
    """Run all checks, in the order in which a training run would meet the problems.

    Raises:
        UserError: an input of a job was given on a laptop. A laptop does not need this check, because `ingest` and
            `caption` report an unreadable input within seconds.
    """
    if isinstance(config.platform, DatabricksPlatformConfig):
        return [check_python(), *check_workspace(config, open_platform(config.platform), inputs)]
    if inputs != NO_INPUTS:
        raise UserError(
            "doctor checks the input of a job only in a workspace",
            where="--source-path, --table, --id-column, --image-column, --where or --caption-options",
            got=config.platform.kind,
            fix="leave the option out, or add --platform databricks",
        )
    checks = [check_python(), *(check_package(name) for name in PACKAGES)]
    if not config.platform.spark.is_connect:  # a Spark Connect server has its own Java and its own jars
        checks += [check_java_version(), check_delta_jar()]
    checks.append(check_task_slots(config.platform))
    checks += [check_gpu(config.platform.ranks), check_memory(), check_home(config)]
    failed = [check.name for check in checks if check.status == "fail"]
    if failed:
        return [
            *checks,
            DoctorCheck(name="spark", status="warn", found=f"not started: correct {', '.join(failed)} first"),
        ]
    return [*checks, check_spark(open_platform(config.platform))]


def check_spark(platform: Platform) -> DoctorCheck:
    """Start Spark, and merge a row into a Delta table in a temporary folder of the home folder.

    The check fails if the versions of Spark and Delta Lake do not fit together, or if a Spark setting breaks Delta.
    """
    from pipelines.driver.delta.spark_errors import translate_spark_errors

    folder = platform.folder("staged").absolute() / f"doctor-{uuid.uuid4().hex}"
    table = "delta.`{}`".format(str(folder).replace("`", "``"))
    try:
        spark = platform.open_spark()
        with translate_spark_errors("Spark cannot write to a Delta table", where=str(folder)):
            spark.sql(f"CREATE TABLE {table} (id INT) USING delta")
            spark.sql(
                f"MERGE INTO {table} old USING (SELECT 1 AS id) new ON old.id = new.id "
                "WHEN MATCHED THEN UPDATE SET * WHEN NOT MATCHED THEN INSERT *"
            )
        return DoctorCheck(name="spark", status="ok", found=f"{spark.version}, a MERGE into a Delta table has worked")
    except UserError as error:
        return DoctorCheck(name="spark", status="fail", found=f"{error.what}: {error.got}", fix=error.fix)
    except StageFailed as error:
        fix = f"remove settings from platform.spark.conf, or install versions that fit each other: {INSTALL}"
        return DoctorCheck(name="spark", status="fail", found=f"{error.what}: {error.got}", fix=fix)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_python() -> DoctorCheck:
    """Report the Python version. The check always passes, because pip does not install Lakesight for older versions."""
    return DoctorCheck(name="python", status="ok", found=f"{sys.version.split()[0]} at {sys.executable}")


def check_package(name: str) -> DoctorCheck:
    """Check that a package is installed, and report the package's version."""
    try:
        return DoctorCheck(name=name, status="ok", found=importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return DoctorCheck(name=name, status="fail", found="not installed", fix=INSTALL)


def check_java_version() -> DoctorCheck:
    """Check the version of Java that Spark would start."""
    try:
        return DoctorCheck(name="java", status="ok", found=str(check_java()))
    except UserError as error:
        return DoctorCheck(name="java", status="fail", found=error.got or error.what, fix=error.fix)


def check_delta_jar() -> DoctorCheck:
    """Check that Delta's jar is in Ivy's cache, or that the jar can be downloaded from Maven Central."""
    try:
        artifact, delta = delta_artifact()
    except importlib.metadata.PackageNotFoundError:
        return DoctorCheck(
            name="delta jar",
            status="fail",
            found="delta-spark is not installed",
            fix=INSTALL,
        )
    cached: list[Path] = []
    with suppress(RuntimeError):  # there is no home: HOME is not set and the user has no name, as in many containers
        cached = list(Path.home().glob(f".ivy2*/jars/io.delta_{artifact}-{delta}.jar"))
    if cached:
        return DoctorCheck(name="delta jar", status="ok", found=f"{artifact} {delta}, cached")
    url = f"https://repo1.maven.org/maven2/io/delta/{artifact}/{delta}/{artifact}-{delta}.pom"
    try:
        with urllib.request.urlopen(url, timeout=MAVEN_TIMEOUT_SECONDS):
            return DoctorCheck(
                name="delta jar",
                status="ok",
                found=f"{artifact} {delta} is not cached; the first start downloads 90 MB",
            )
    except urllib.error.HTTPError as error:
        return DoctorCheck(
            name="delta jar",
            status="fail",
            found=f"Delta's jar is not cached, and {url} answers with status {error.code}",
            fix=f"install versions of pyspark and delta-spark that fit each other: {INSTALL}",
        )
    except (urllib.error.URLError, TimeoutError) as error:
        return DoctorCheck(
            name="delta jar",
            status="fail",
            found=f"Delta's jar is not cached, and {url} cannot be read: {error}",
            fix="connect to the internet for the first start, or copy the folders ~/.ivy2* from another machine",
        )


def check_task_slots(platform: LocalPlatformConfig) -> DoctorCheck:
    """Compare the number of training ranks with the machine's cores, and with the task slots of a master
    `local-cluster[...]`.
    """
    cores, ranks, master = os.cpu_count() or 1, platform.ranks, platform.spark.master
    if master.startswith("local-cluster"):
        executors, cores_each, _ = master.partition("[")[2].rstrip("]").split(",")
        slots = int(executors) * int(cores_each)
        if slots < ranks:
            found = f"{slots} slots in {master}, fewer than {ranks} ranks"
            return DoctorCheck(
                name="slots",
                status="fail",
                found=found,
                fix=f"add --set platform.ranks={slots}, or give platform.spark.master more slots",
            )
    if cores < ranks:
        fix = f"add --set platform.ranks={cores}: training is faster if each rank has its own core"
        return DoctorCheck(name="slots", status="warn", found=f"{cores} cores for {ranks} ranks", fix=fix)
    return DoctorCheck(name="slots", status="ok", found=f"{cores} cores for {ranks} ranks")


def check_gpu(ranks: int) -> DoctorCheck:
    """List the GPUs that torch can use. The check passes without a GPU, because a laptop can train on its CPU.

    Args:
        ranks: number of ranks of a training run. The ranks use GPUs only if there is a GPU for each rank.
    """
    try:
        import torch
    except ImportError:
        return DoctorCheck(name="gpu", status="warn", found="torch is not installed", fix=INSTALL)
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    found = ", ".join(names) or "none; training uses the CPU"
    if 0 < len(names) < ranks:
        fix = f"add --set platform.ranks={len(names)}, because {ranks} ranks would train on CPUs"
        return DoctorCheck(name="gpu", status="warn", found=found, fix=fix)
    return DoctorCheck(name="gpu", status="ok", found=found)


def check_memory() -> DoctorCheck:
    """Check the machine's memory against the recommended minimum."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = f"{total / 2**30:.1f} GB"
    if total < RECOMMENDED_MEMORY_BYTES:
        return DoctorCheck(
            name="memory", status="warn", found=found, fix="run commands with --set platform.spark.driver_memory=1g"
        )
    return DoctorCheck(name="memory", status="ok", found=found)


def check_home(config: RunConfig) -> DoctorCheck:
    """Check that the home folder is writable and that the disk of the home folder has enough free space."""
    try:
        root = open_platform(config.platform).root
    except UserError as error:
        return DoctorCheck(name="home", status="fail", found=f"{error.where}: {error.got}", fix=error.fix)
    try:
        free = shutil.disk_usage(root).free
    except OSError as error:
        return DoctorCheck(
            name="home",
            status="fail",
            found=f"{root}: {error.strerror}",
            fix="set LAKESIGHT_HOME to an existing folder",
        )
    found = f"{root}, {free / 2**30:.1f} GB free"
    if free < MIN_FREE_BYTES:
        return DoctorCheck(
            name="home",
            status="fail",
            found=found,
            fix="free disk space, or set LAKESIGHT_HOME to a folder on another disk",
        )
    if free < RECOMMENDED_FREE_BYTES:
        return DoctorCheck(name="home", status="warn", found=found, fix="free 5 GB for shards, runs and models")
    return DoctorCheck(name="home", status="ok", found=found)

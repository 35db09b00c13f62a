"""`lakesight doctor`: is this machine ready, and if not, what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Literal

from jobs.common import MIN_FREE_BYTES, JsonOption, PlatformOption, RunOption, SetOption, open_screen
from pipelines.config import LocalPlatformConfig, RunConfig, load_run
from pipelines.errors import StageFailed, UserError
from pipelines.platform import check_java, open_platform
from pipelines.platform.jars import delta_artifact
from vlm.config import Config

COMFORTABLE_FREE_BYTES = 5 * 2**30
COMFORTABLE_MEMORY_BYTES = 6 * 2**30
SECONDS_FOR_MAVEN = 5
PACKAGES = ("pyspark", "delta-spark", "deltalake", "mlflow", "torch", "pyarrow")


class Check(Config):
    """One thing looked at. `fix` is empty where nothing needs doing."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


def doctor(
    *,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check this machine, and say how to fix it.

    Java, packages, Delta's jars, slots, GPU, memory, disk and the home folder.

    \b
    Example:
      lakesight doctor
    """
    with open_screen(as_json=as_json) as screen:
        config = load_run(run, platform=platform, overrides=overrides or ())
        checks = examine(config)
        for check in checks:
            screen.line(check.name, f"{check.status:<5} {check.found}")
            if check.fix:
                screen.line("", f"      fix: {check.fix}")
        failed = [check.name for check in checks if check.status == "fail"]
        screen.report({"ready": not failed, "checks": checks})
        if failed:
            raise StageFailed("this machine is not ready", got=", ".join(failed), fix="do what the lines above say")


def examine(config: RunConfig) -> list[Check]:
    """Every check, in the order in which a run would stumble over them."""
    checks = [check_python(), *(check_package(name) for name in PACKAGES)]
    if isinstance(config.platform, LocalPlatformConfig):
        checks += [java(), delta_jar(), slots(config.platform)]
    checks += [gpu(), memory(), home(config)]
    return checks


def check_python() -> Check:
    """Python's version (pip refuses older ones already; this is for the record)."""
    return Check(name="python", status="ok", found=f"{sys.version.split()[0]} at {sys.executable}")


def check_package(name: str) -> Check:
    """The version of an installed package."""
    try:
        return Check(name=name, status="ok", found=importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name=name, status="fail", found="not installed", fix="pip install 'lakesight[local]'")


def java() -> Check:
    """The Java that Spark would start."""
    try:
        return Check(name="java", status="ok", found=str(check_java()))
    except UserError as error:
        return Check(name="java", status="fail", found=error.got or error.what, fix=error.fix)


def delta_jar() -> Check:
    """Delta's jar in Ivy's cache, or to be had from Maven Central."""
    try:
        artifact, delta = delta_artifact()
    except importlib.metadata.PackageNotFoundError:
        return Check(
            name="delta jar", status="fail", found="its package is not installed", fix="pip install 'lakesight[local]'"
        )
    if list(Path.home().glob(f".ivy2*/jars/io.delta_{artifact}-{delta}.jar")):
        return Check(name="delta jar", status="ok", found=f"{artifact} {delta}, cached")
    url = f"https://repo1.maven.org/maven2/io/delta/{artifact}/{delta}/{artifact}-{delta}.pom"
    try:
        with urllib.request.urlopen(url, timeout=SECONDS_FOR_MAVEN):
            return Check(
                name="delta jar", status="ok", found=f"{artifact} {delta}, to be fetched at the first start (90 MB)"
            )
    except (urllib.error.URLError, TimeoutError) as error:
        return Check(
            name="delta jar",
            status="fail",
            found=f"not cached, and {url} does not answer: {error}",
            fix="connect to the internet for the first start, or copy another machine's ~/.ivy2* folder",
        )


def slots(platform: LocalPlatformConfig) -> Check:
    """Places for the ranks that training starts at once: cores beside the driver, or the master's task slots."""
    cores, ranks, master = os.cpu_count() or 1, platform.ranks, platform.spark.master
    if master.startswith("local-cluster"):
        executors, cores_each, _ = master.partition("[")[2].rstrip("]").split(",")
        there = int(executors) * int(cores_each)
        if there < ranks:
            found = f"{there} in {master}, fewer than {ranks} ranks"
            return Check(
                name="slots", status="fail", found=found, fix=f"--set platform.ranks={there}, or a larger master"
            )
    if cores < ranks:
        fix = f"ranks share cores: --set platform.ranks={cores} is faster"
        return Check(name="slots", status="warn", found=f"{cores} cores for {ranks} ranks", fix=fix)
    return Check(name="slots", status="ok", found=f"{cores} cores for {ranks} ranks")


def gpu() -> Check:
    """GPUs that torch can use. A laptop trains on its CPU, so none is no fault."""
    try:
        import torch
    except ImportError:
        return Check(name="gpu", status="warn", found="torch is not installed", fix="pip install 'lakesight[local]'")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Check(name="gpu", status="ok", found=", ".join(names) or "none; training uses the CPU")


def memory() -> Check:
    """Memory of the machine."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = f"{total / 2**30:.1f} GB"
    if total < COMFORTABLE_MEMORY_BYTES:
        return Check(name="memory", status="warn", found=found, fix="--set platform.spark.driver_memory=1g")
    return Check(name="memory", status="ok", found=found)


def home(config: RunConfig) -> Check:
    """The folder everything is kept in: writable, and with room."""
    try:
        root = open_platform(config.platform).root
    except UserError as error:
        return Check(name="home", status="fail", found=f"{error.where}: {error.got}", fix=error.fix)
    try:
        free = shutil.disk_usage(root).free
    except OSError as error:
        return Check(name="home", status="fail", found=f"{root}: {error.strerror}", fix="name a folder that exists")
    found = f"{root}, {free / 2**30:.1f} GB free"
    if free < MIN_FREE_BYTES:
        return Check(
            name="home", status="fail", found=found, fix="free some room, or set LAKESIGHT_HOME to another disk"
        )
    if free < COMFORTABLE_FREE_BYTES:
        return Check(name="home", status="warn", found=found, fix="5 GB leave room for shards, runs and models")
    return Check(name="home", status="ok", found=found)

"""Check of the hosts on which ranks will run: installed packages, versions and GPUs.

Without this check, a rank that lacks a package would fail after a minute, and only the log of the rank would have the
error. Ranks with different versions of torch would hang or fail in collectives. The check runs before any rank starts
and reports the host and the package in one sentence.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from pipelines.driver.delta.spark_errors import translate_spark_errors
from pipelines.driver.train.launch import open_distributor
from pipelines.errors import UserError
from pipelines.executor import host_info
from pipelines.formats.run_folder import Host, HostsFile, RunFolder, write_json
from pipelines.formats.training_code import TrainingCode
from pipelines.platform import Launch, call_in_barrier_stage, cancel_if_slots_are_lost

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger(__name__)

EQUAL = ("torch", "lakesight")
"""Packages whose version must be equal on all hosts."""

HostValue = tuple[str, str]
"""A pair of a value, such as a package version, and the host that reports the value."""


def check_hosts(run: RunFolder, open_spark: Callable[[], SparkSession], launch: Launch) -> None:
    """Describe every host that ranks will run on, check that the hosts are compatible, and write hosts.json.

    Raises:
        UserError: a package is missing on a host, or the hosts have different versions of torch, Lakesight or the
            training code. The error is also raised if ranks need GPUs and torch can use no GPU of a host.
        StageFailed: the executors did not describe their hosts.
    """
    if launch.local_mode:
        described = [host_info.describe_host()]
    else:
        described = _describe_executors(open_spark(), open_distributor(launch).num_tasks)
    # Executors that share a host and a Python interpreter return equal host descriptions.
    distinct = {host.model_dump_json(): host for host in map(Host.model_validate, described)}
    hosts = [distinct[key] for key in sorted(distinct)]
    check_compatible(hosts, version("lakesight"))
    if launch.use_gpu:
        check_gpus(hosts)
    elif launch.local_mode:
        warn_of_idle_gpus(hosts[0], launch.ranks, os.environ.get("CUDA_VISIBLE_DEVICES"))
    check_code(hosts, run.read_run().code)
    write_json(run.hosts, HostsFile(hosts=tuple(hosts)))
    log.info("the ranks run on these hosts: %s", summarize(hosts))


def _describe_executors(spark: SparkSession, tasks: int) -> list[dict[str, object]]:
    """Let each task of a barrier stage describe its host. A barrier stage runs all its tasks at the same time, and the
    ranks will run at the same time, too.
    """

    def describe_task() -> dict[str, object]:
        # A nested function is pickled by value, so the function also runs on hosts where this package is not installed.
        try:
            from pipelines.executor.host_info import describe_host
        except ImportError:
            return {"name": socket.gethostname(), "executable": sys.executable, "packages": {"lakesight": ""}}
        return describe_host()

    failure, where = "the executors cannot describe their hosts", str(spark.conf.get("spark.master"))
    with translate_spark_errors(failure, where=where), cancel_if_slots_are_lost(spark, tasks):
        return call_in_barrier_stage(spark, describe_task, tasks)


def check_compatible(hosts: Sequence[Host], driver_version: str) -> None:
    """Check that the ranks of one run can work together on these hosts, and log a warning about tolerated differences.

    Args:
        hosts: descriptions of the hosts, one per Python interpreter.
        driver_version: Lakesight version of the driver. Ranks need the driver's version, because ranks read files that
            the driver writes.

    Raises:
        UserError: a package is missing, or the versions of torch or Lakesight differ.
    """
    lacking = [(host, [name for name, found in host.packages.items() if not found]) for host in hosts]
    if any(names for _, names in lacking):
        raise UserError(
            "packages that ranks need are missing",
            where="the Python interpreters of the ranks",
            got=[f"no {', '.join(names)} on {_host_label(host)}" for host, names in lacking if names],
            fix=f"on every host, install lakesight {driver_version} and torch for the Python interpreter of the ranks",
        )
    versions = _versions(hosts)
    for name in EQUAL:
        reported = versions.pop(name) + ([(driver_version, "the driver")] if name == "lakesight" else [])
        if _differ(reported):
            raise UserError(
                f"the ranks would have different versions of {name}",
                where="the Python interpreters of the ranks",
                got=_format_values(reported),
                fix="install the same version on every host",
            )
    for name, reported in versions.items():
        if _differ(reported):
            log.warning("the hosts of the ranks differ in %s: %s", name, _format_values(reported))


def check_gpus(hosts: Sequence[Host]) -> None:
    """Check that torch can use a GPU on each host.

    Raises:
        UserError: a host has no GPU, the GPU driver of a host does not work, or torch was built without CUDA.
    """
    found = []
    for host in hosts:
        if not host.gpus:
            found.append(f"{host.driver or 'no GPU'} on {_host_label(host)}")  # `driver`: error of nvidia-smi, if any
        elif not host.cuda:
            found.append(f"torch {host.packages['torch']} was built without CUDA on {_host_label(host)}")
    if found:
        raise UserError(
            "some ranks would have no GPU that torch can use",
            where="platform.use_gpu=true",
            got=found,
            fix="start the training cluster on GPU nodes with a GPU runtime (gpu_node and gpu_runtime of the bundle); "
            "or train on CPUs with --set platform.use_gpu=false",
        )


def warn_of_idle_gpus(host: Host, ranks: int, visible: str | None) -> None:
    """Log a warning if the ranks on the driver's host use CPUs only because the host has fewer GPUs than ranks.

    Args:
        host: description of the driver's host.
        ranks: number of ranks, which all run on this host.
        visible: value of the environment variable CUDA_VISIBLE_DEVICES, or None if the variable is not set.
    """
    gpus = len(host.gpus) if host.cuda else 0
    if visible is not None:
        gpus = min(gpus, len([name for name in visible.split(",") if name.strip() not in {"", "-1"}]))
    if 0 < gpus < ranks:
        log.warning(
            "the ranks use CPUs and no GPU, because %d ranks need a GPU each and host %s has %d. To use the GPUs, add "
            "--set platform.ranks=%d",
            *(ranks, host.name, gpus, gpus),
        )


def check_code(hosts: Sequence[Host], code: TrainingCode | None) -> None:
    """Check that ranks import the code that run.json records.

    Raises:
        UserError: a host has the same Lakesight version with different source files.
    """
    others = [host for host in hosts if code and host.code not in {"", code.digest}]
    if code and others:
        raise UserError(
            "the code on the hosts of the ranks differs from the code that run.json records",
            where="the Python interpreters of the ranks",
            got=_format_values([(code.digest, "the driver"), *((host.code, _host_label(host)) for host in others)]),
            fix="install the same build of lakesight on every host",
        )


def _versions(hosts: Sequence[Host]) -> dict[str, list[HostValue]]:
    """Return a dict from a name, such as a package, 'python' or 'GPUs', to the versions or GPUs that the hosts
    report."""
    values = {name: [(host.packages[name], _host_label(host)) for host in hosts] for name in hosts[0].packages}
    for name in ("python", "cuda", "nccl", "driver"):
        values[name] = [(getattr(host, name), _host_label(host)) for host in hosts]
    values["GPUs"] = [(", ".join(host.gpus), _host_label(host)) for host in hosts]
    return values


def _differ(reported: Sequence[HostValue]) -> bool:
    return len({value for value, _ in reported}) > 1


def _format_values(reported: Sequence[HostValue]) -> str:
    """Format each distinct value with the names of the hosts that report this value."""
    hosts = {value: [host for each, host in reported if each == value] for value, _ in reported}
    return "; ".join(f"{value or 'none'} on {', '.join(names)}" for value, names in hosts.items())


def _host_label(host: Host) -> str:
    return f"host {host.name} ({host.executable})"


def summarize(hosts: Sequence[Host]) -> str:
    """Summarize the hosts in one line that gives the names of all hosts and the properties of the first host."""
    first, names = hosts[0], sorted({host.name for host in hosts})
    facts = [
        ", ".join(names),
        f"{first.cores} cores, {first.memory_bytes / 2**30:,.0f} GB" + (" each" if len(names) > 1 else ""),
        *([f"{count} x {name}" for name, count in Counter(first.gpus).items()] or ["no GPU"]),
        f"Python {first.python}, torch {first.packages['torch']}",
        *(f"{name} {value}" for name, value in (("NCCL", first.nccl), ("driver", first.driver)) if value),
    ]
    return "; ".join(facts)

"""What the hosts of a run's ranks are and have: asked before any rank starts, refused where ranks could not work.

A rank that lacks a package dies after a minute of starting and says so in its log; ranks of two versions of torch hang,
or fail in each other's collectives. Asked here, it is one sentence that names host and package.
"""

from __future__ import annotations

import logging
import socket
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from pipelines.driver.delta.failures import spark_failures
from pipelines.driver.train.launch import open_distributor, slots_kept
from pipelines.errors import UserError
from pipelines.executor import host_info
from pipelines.formats.run_folder import Host, HostsFile, RunDir, write_json
from pipelines.platform import Launch

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger(__name__)

EQUAL = ("torch", "lakesight")
"""Packages of which there must be one version."""

Told = tuple[str, str]
"""A version, or what there is instead, and the place that has it."""


def check_hosts(run: RunDir, spark: SparkSession, launch: Launch) -> None:
    """Ask every host that ranks will run on what it has, demand what they need, and write hosts.json.

    Raises:
        UserError: a package is missing somewhere, or torch or Lakesight is not the same everywhere.
        StageFailed: the executors cannot be asked.
    """
    found = [host_info.describe()] if launch.local_mode else _ask_executors(spark, open_distributor(launch).num_tasks)
    # Executors that share a machine and an interpreter say the same.
    distinct = {host.model_dump_json(): host for host in map(Host.model_validate, found)}
    hosts = [distinct[key] for key in sorted(distinct)]
    compare(hosts, version("lakesight"))
    write_json(run.hosts, HostsFile(hosts=tuple(hosts)))
    log.info("ranks run on %s", summary(hosts))


def _ask_executors(spark: SparkSession, tasks: int) -> list[dict[str, object]]:
    """What is said in each of the places that ranks will have: a barrier stage takes them all at once, as ranks do."""

    def look(_: Iterable[int]) -> Iterator[dict[str, object]]:
        # A function inside a function travels as code, not by name: what it is a part of may be missing there.
        try:
            from pipelines.executor.host_info import describe
        except ImportError:
            yield {"name": socket.gethostname(), "executable": sys.executable, "packages": {"lakesight": ""}}
        else:
            yield describe()

    context, what = spark.sparkContext, "the executors cannot be asked what they have"
    with spark_failures(what, where=str(context.master)), slots_kept(spark, tasks):
        return context.parallelize(range(tasks), tasks).barrier().mapPartitions(look).collect()


def compare(hosts: Sequence[Host], own: str) -> None:
    """Refuse hosts on which the ranks of one run cannot work together; warn of other differences.

    Args:
        hosts: each interpreter once.
        own: the driver's version of Lakesight: ranks read the files that it writes.

    Raises:
        UserError: they cannot.
    """
    lacking = [(host, [name for name, there in host.packages.items() if not there]) for host in hosts]
    if any(names for _, names in lacking):
        raise UserError(
            "packages that ranks need are missing",
            where="the Python of the ranks",
            got="; ".join(f"no {', '.join(names)} on {_place(host)}" for host, names in lacking if names),
            fix=f"install lakesight {own} and torch for that Python, on every host",
        )
    versions = _versions(hosts)
    for name in EQUAL:
        there = versions.pop(name) + ([(own, "the driver")] if name == "lakesight" else [])
        if _differ(there):
            raise UserError(
                f"the ranks would have different versions of {name}",
                where="the Python of the ranks",
                got=_listed(there),
                fix="install the same version on every host",
            )
    for name, there in versions.items():
        if _differ(there):
            log.warning("the hosts of the ranks differ in %s: %s", name, _listed(there))


def _versions(hosts: Sequence[Host]) -> dict[str, list[Told]]:
    """Whatever has a version, and the GPUs, by name."""
    told = {name: [(host.packages[name], _place(host)) for host in hosts] for name in hosts[0].packages}
    for name in ("python", "cuda", "nccl", "driver"):
        told[name] = [(getattr(host, name), _place(host)) for host in hosts]
    told["GPUs"] = [(", ".join(host.gpus), _place(host)) for host in hosts]
    return told


def _differ(told: Sequence[Told]) -> bool:
    return len({value for value, _ in told}) > 1


def _listed(told: Sequence[Told]) -> str:
    """Each value once, with the places that have it."""
    places = {value: [place for each, place in told if each == value] for value, _ in told}
    return "; ".join(f"{value or 'none'} on {', '.join(there)}" for value, there in places.items())


def _place(host: Host) -> str:
    return f"host {host.name} ({host.executable})"


def summary(hosts: Sequence[Host]) -> str:
    """The hosts by name, and what the first has: the others have the same, or it was warned of."""
    first, names = hosts[0], sorted({host.name for host in hosts})
    facts = [
        ", ".join(names),
        f"{first.cores} cores, {first.memory_bytes / 2**30:,.0f} GB" + (" each" if len(names) > 1 else ""),
        *([f"{count} x {name}" for name, count in Counter(first.gpus).items()] or ["no GPU"]),
        f"Python {first.python}, torch {first.packages['torch']}",
        *(f"{name} {value}" for name, value in (("NCCL", first.nccl), ("driver", first.driver)) if value),
    ]
    return "; ".join(facts)

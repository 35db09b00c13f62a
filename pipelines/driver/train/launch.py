"""Launch of ranks, either as child processes on this host, or on executors with TorchDistributor.

TorchDistributor is used only to start processes on executors. TorchDistributor notices missing task slots only after
ten minutes, reports no causes of failures, and prints the output of ranks to the terminal. Therefore, this module
counts the task slots before the launch, and writes the output of TorchDistributor (the launcher) to a file in the run
folder. `failure.py` finds the causes of failures.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pipelines.child_process import start_ticks
from pipelines.driver.train.local_ranks import RankEntry, run_local_ranks
from pipelines.errors import UserError
from pipelines.formats.run_folder import RunFolder
from pipelines.platform import Launch, cancel_if_slots_are_lost, count_slots, spark_errors

if TYPE_CHECKING:
    from pyspark.ml.torch.distributor import TorchDistributor
    from pyspark.sql import SparkSession

log = logging.getLogger(__name__)

SLOT_SECONDS = 10.0
"""Time that executors may take to register after their start, in seconds."""
EXIT_SECONDS = 5.0
"""Number of seconds that a rank may take to exit after SIGTERM, and then again after SIGKILL."""

GPU_AMOUNT = "spark.task.resource.gpu.amount"


def run_rank(run_folder: str) -> None:
    """Run one rank. The process of each rank calls this function. `pipelines.worker.main` is imported only here, so
    that the driver does not import torch.
    """
    importlib.import_module("pipelines.worker.main").run_rank(run_folder)


def check_slots(open_spark: Callable[[], SparkSession], launch: Launch, seconds: float = SLOT_SECONDS) -> None:
    """Check that the cluster can run all tasks of the ranks at once. Ranks on the driver's host need no slots.

    Spark itself would retry for ten minutes before it reports missing slots.

    Args:
        open_spark: function that returns the Spark session whose executors run the ranks.
        launch: number and location of the ranks.
        seconds: time to wait for executors that have not registered yet, in seconds.

    Raises:
        UserError: the cluster has too few slots.
    """
    if launch.local_mode:
        return
    spark, needed = open_spark(), open_distributor(launch).num_tasks
    deadline = time.monotonic() + seconds
    while (slots := count_slots(spark)) < needed:
        if time.monotonic() > deadline:
            per_task = launch.ranks // needed
            raise UserError(
                "the Spark cluster has too few task slots for the ranks",
                where=f"Spark master {spark.conf.get('spark.master')}",
                got=f"{slots} task slots, but {launch.ranks} ranks need {needed}",
                fix=f"start more executors, or lower platform.ranks to {per_task * max(1, slots)} or fewer",
            )
        time.sleep(0.5)


def open_distributor(launch: Launch) -> TorchDistributor:
    """Create the launcher.

    The launcher runs one Spark task per rank. If a Spark task has several GPUs, one task runs several ranks instead.

    Raises:
        UserError: the GPU settings of the Spark session do not allow one GPU per rank.
    """
    from pyspark.ml.torch.distributor import TorchDistributor
    from pyspark.sql import SparkSession

    try:
        return TorchDistributor(launch.ranks, local_mode=launch.local_mode, use_gpu=launch.use_gpu)
    except (RuntimeError, ValueError) as error:
        amount = SparkSession.active().conf.get(GPU_AMOUNT, None)
        raise UserError(
            "the Spark session cannot give each rank its own GPU",
            where=f"platform.ranks={launch.ranks}, {GPU_AMOUNT}={amount or ''}",
            got=str(error),
            fix=f"start the training cluster with {GPU_AMOUNT}=1, because ranks cannot share a GPU; "
            "or train on CPUs with platform.use_gpu=false",
        ) from None


def run_ranks(
    run: RunFolder, open_spark: Callable[[], SparkSession], launch: Launch, entry: RankEntry
) -> Exception | None:
    """Run all ranks until they end. Return the exception of the launcher, or None.

    When this function returns, all ranks on this host have ended, except ranks that even SIGKILL did not end.

    Raises:
        KeyboardInterrupt: the user interrupted the run. The ranks on this host have been ended.
    """
    if launch.local_mode:
        return run_local_ranks(run, launch.ranks, entry)

    failures: tuple[type[Exception], ...] = (RuntimeError, UnicodeDecodeError, *spark_errors())
    distributor = open_distributor(launch)
    try:
        with cancel_if_slots_are_lost(open_spark(), distributor.num_tasks), _stderr_to_file(run):
            distributor.run(entry, str(run.path))
    except failures as error:
        log.debug("the launcher failed", exc_info=True)
        return error
    finally:
        end_leftover_ranks(run)
    return None


@contextlib.contextmanager
def _stderr_to_file(run: RunFolder) -> Iterator[None]:
    """Redirect the output that the launcher writes to stderr into launcher.log.

    Log lines of the driver still reach the terminal, because the existing logging handlers keep the terminal as their
    stream.
    """
    run.launcher_log.parent.mkdir(parents=True, exist_ok=True)
    with (
        run.launcher_log.open("w", encoding="utf-8", buffering=1) as file,
        contextlib.redirect_stderr(file),
    ):
        yield


def end_leftover_ranks(run: RunFolder) -> None:
    """End the ranks that a launcher has left running on this host, first with SIGTERM and then with SIGKILL."""
    here = [rank for rank in run.read_ranks() if rank.host == socket.gethostname() and not rank.ended]
    # The start times are compared, because the process id of a rank that has ended may belong to another process now.
    pids = [rank.pid for rank in here if start_ticks(rank.pid) == rank.start_ticks]
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + EXIT_SECONDS
        pids = [pid for pid in pids if _signal(pid, number)]
        while pids and time.monotonic() < deadline:
            time.sleep(0.1)
            pids = [pid for pid in pids if _signal(pid, 0)]


def _signal(pid: int, number: int) -> bool:
    """Send a signal to a process, and return whether the process exists and belongs to this user.

    Signal 0 only checks whether the process exists.
    """
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True

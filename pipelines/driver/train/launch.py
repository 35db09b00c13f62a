"""Start ranks with TorchDistributor and come back: with their slots checked before, and nobody left behind after.

Unusual: TorchDistributor is trusted with starting processes, and with nothing else. It notices missing slots after ten
minutes, says nothing about causes, and prints what ranks print wherever it likes; so slots are counted here, causes
are read from the run folder, and its stream goes into a file there.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pipelines.background import in_background
from pipelines.errors import UserError
from pipelines.formats.run_folder import LauncherFile, RunDir, read_json, write_json
from pipelines.platform import Launch

if TYPE_CHECKING:
    from pyspark.ml.torch.distributor import TorchDistributor
    from pyspark.sql import SparkSession

log = logging.getLogger(__name__)

SLOT_SECONDS = 10.0
"""How long executors that have just started may take to report for work."""
SHORT_SECONDS = 30.0
"""How long a cluster may have too few slots for a stage that has begun, or is about to."""
POLL_SECONDS = 1.0
LEAVE_SECONDS = 5.0

GPU_AMOUNT = "spark.task.resource.gpu.amount"

RankEntry = Callable[[str], None]


def run_rank(run_dir: str) -> None:
    """What TorchDistributor calls in each rank. By name only: this module is the driver's and never sees torch."""
    importlib.import_module("pipelines.worker.main").run_rank(run_dir)


def check_slots(spark: SparkSession, launch: Launch, seconds: float = SLOT_SECONDS) -> None:
    """Compare ranks with the tasks that the cluster can run at once. Ranks beside the driver need no slot.

    Executors that are about to report for work are waited for, `seconds` at most.

    Raises:
        UserError: too few. Spark would try for ten minutes before it says so.
    """
    if launch.local_mode:
        return
    needed = open_distributor(launch).num_tasks
    context = spark.sparkContext._jsc.sc()
    deadline = time.monotonic() + seconds
    while (slots := _slots(context)) < needed:
        if time.monotonic() > deadline:
            per_task = launch.ranks // needed
            raise UserError(
                "the cluster has too few slots for the ranks",
                where=f"Spark master {spark.sparkContext.master}",
                got=f"{slots} tasks at once, {needed} needed for {launch.ranks} ranks",
                fix=f"start more executors, or lower platform.ranks to {per_task * max(1, slots)} or fewer",
            )
        time.sleep(0.5)


def _slots(context: object) -> int:
    """What Spark itself asks before it starts a barrier stage: cores, and GPUs where tasks claim them."""
    profile = context.resourceProfileManager().defaultResourceProfile()  # type: ignore[attr-defined]
    return int(context.maxNumConcurrentTasks(profile))  # type: ignore[attr-defined]


@contextlib.contextmanager
def slots_kept(spark: SparkSession, tasks: int) -> Iterator[None]:
    """Cancel what this thread runs on Spark inside the block, should there be too few slots left for so many tasks.

    Spark counts slots when it takes on a barrier stage and never again: it would wait for ever for a host that is gone.
    Whoever waits for the stage gets Spark's error, which says how many slots are left.
    """
    context, tag = spark.sparkContext, f"lakesight-{uuid.uuid4().hex}"

    def watch(ended: threading.Event) -> None:
        enough = time.monotonic()
        while not ended.wait(POLL_SECONDS):
            if (slots := _slots(context._jsc.sc())) >= tasks:
                enough = time.monotonic()
            elif time.monotonic() - enough > SHORT_SECONDS:
                context._jsc.sc().cancelJobsWithTag(tag, f"executors are gone: {slots} of {tasks} slots are left")

    context.addJobTag(tag)
    try:
        with in_background(watch, "slots"):
            yield
    finally:
        context.removeJobTag(tag)


def open_distributor(launch: Launch) -> TorchDistributor:
    """The launcher. Its tasks are as many as the ranks, or fewer where one task has several GPUs: a rank for each.

    Raises:
        UserError: the session's GPU settings do not fit the ranks.
    """
    from pyspark.ml.torch.distributor import TorchDistributor
    from pyspark.sql import SparkSession

    try:
        return TorchDistributor(launch.ranks, local_mode=launch.local_mode, use_gpu=launch.use_gpu)
    except (RuntimeError, ValueError) as error:
        amount = SparkSession.active().conf.get(GPU_AMOUNT, None)
        raise UserError(
            "the Spark session cannot give each rank its GPU",
            where=f"platform.ranks={launch.ranks}, {GPU_AMOUNT}={amount or ''}",
            got=str(error),
            fix=f"start the training cluster with {GPU_AMOUNT}=1: a share of a GPU is no place for a rank; "
            "platform.use_gpu=false trains on CPUs",
        ) from None


@contextlib.contextmanager
def only_launch(run: RunDir) -> Iterator[None]:
    """Keep a second launch from this host off the run folder: its ranks would meet those of the first in their files.

    Raises:
        UserError: another living process holds the run.
    """
    here, own = socket.gethostname(), os.getpid()
    if run.launcher.exists():
        held = read_json(run.launcher, LauncherFile)
        if held.host == here and held.pid != own and _signal(held.pid, 0):
            raise UserError(
                "this run is being trained already",
                where=str(run.path),
                got=f"process {held.pid} on this host holds it",
                fix=f"wait for it or end it; if it is something else by now, remove {run.launcher}",
            )
    write_json(run.launcher, LauncherFile(host=here, pid=own))
    try:
        yield
    finally:
        run.launcher.unlink(missing_ok=True)


def start_ranks(run: RunDir, spark: SparkSession, launch: Launch, entry: RankEntry) -> Exception | None:
    """Run every rank to its end; returns what the launcher raised, if it did. No rank on this host outlives the call.

    Raises:
        KeyboardInterrupt: the user's; the ranks have ended then too.
    """
    from py4j.protocol import Py4JError  # type: ignore[import-untyped]
    from pyspark.errors import PySparkException

    distributor = open_distributor(launch)
    kept = contextlib.nullcontext() if launch.local_mode else slots_kept(spark, distributor.num_tasks)
    try:
        with kept, _stream_to_file(run, launch):
            distributor.run(entry, str(run.path))
    except (RuntimeError, UnicodeDecodeError, PySparkException, Py4JError) as error:
        log.debug("the launcher failed", exc_info=True)
        return error
    finally:
        _end_leftovers(run)
    return None


@contextlib.contextmanager
def _stream_to_file(run: RunDir, launch: Launch) -> Iterator[None]:
    """Send to a file what the launcher prints: on stdout beside the driver, on stderr from executors.

    Who wants the terminal meanwhile holds on to the stream it had before, as logging handlers do.
    """
    run.launcher_log.parent.mkdir(parents=True, exist_ok=True)
    redirect = contextlib.redirect_stdout if launch.local_mode else contextlib.redirect_stderr
    with run.launcher_log.open("w", encoding="utf-8", buffering=1) as file, redirect(file):
        yield


def _end_leftovers(run: RunDir) -> None:
    """End ranks on this host that the launcher left running: it gives them half a second, a network less."""
    left = [rank.pid for rank in run.read_ranks() if rank.host == socket.gethostname() and not rank.ended]
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + LEAVE_SECONDS
        left = [pid for pid in left if _signal(pid, number)]
        while left and time.monotonic() < deadline:
            time.sleep(0.1)
            left = [pid for pid in left if _signal(pid, 0)]


def _signal(pid: int, number: int) -> bool:
    """Send a signal, or with 0 none; False when there is no such process any more."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True

"""Why a training run failed, from what its ranks left behind: the root, not the noise around it.

When one rank dies, the others lose their connection to it and the launcher ends them, so most records tell of
consequences. The root is the earliest record that is not one; else a rank that left no word at all; else, where ranks
waited until their time ran out, the one that had to be ended because it was not waiting with them.
"""

from __future__ import annotations

import re
import socket
import time
from datetime import datetime

from pipelines.errors import TrainingFailed
from pipelines.rundir import Failure, RankFile, RunDir

TIME_RAN_OUT = re.compile(r"timed out|timeout", re.IGNORECASE)
"""How a collective says so; gloo has two ways, depending on which of its threads notices first."""

WORD_SECONDS = 15.0
"""How long ranks that are being ended on other hosts have to leave their record."""


def wait_for_words(run: RunDir) -> None:
    """Wait until the records tell the root: one names a cause of its own, or no rank that could still speak is silent.

    Ranks on this host cannot: the launch has ended them.
    """
    deadline = time.monotonic() + WORD_SECONDS
    while time.monotonic() < deadline:
        if any(not failure.consequence for failure in run.read_failures()):
            return
        if all(rank.host == socket.gethostname() for rank in _silent(run)):
            return
        time.sleep(0.2)


def failure_of(run: RunDir, world_size: int, launcher: BaseException | None) -> TrainingFailed:
    """The error that names rank, host and cause.

    Args:
        run: the run, after the launcher has returned and every rank had its chance to speak.
        world_size: ranks that should have been there.
        launcher: what the launcher raised, if it did.
    """
    failures, silent = run.read_failures(), _silent(run)
    roots = [failure for failure in failures if not failure.consequence]
    if roots:
        return _raised(run, roots[0])
    if silent:
        return _vanished(run, silent[0])
    hung = [failure for failure in failures if failure.exception == "SIGTERM"]
    if hung and TIME_RAN_OUT.search(failures[0].message):
        return _hung(run, hung[0], failures[0])
    if failures:
        return _raised(run, failures[0])
    last = str(launcher or "no word from the launcher").strip().splitlines()[-1]
    return TrainingFailed(
        f"{len(run.read_ranks())} of {world_size} ranks started, and there is no result",
        where=f"host {socket.gethostname()}, log {run.launcher_log}",
        got=last[:500],
        fix="the log has what the launcher said; every host needs this package and sees the run folder",
    )


def _silent(run: RunDir) -> list[RankFile]:
    """Ranks that started and left no word on how they ended, the one first that was silent first."""
    told = {failure.rank for failure in run.read_failures()}
    silent = [rank for rank in run.read_ranks() if not rank.ended and rank.rank not in told]
    return sorted(silent, key=lambda rank: _last_sign(run, rank))


def _raised(run: RunDir, failure: Failure) -> TrainingFailed:
    log = run.log(failure.rank)
    error = TrainingFailed(
        f"rank {failure.rank} failed at step {failure.step}",
        where=f"host {failure.host}, log {log}",
        got=f"{failure.exception}: {failure.message}".rstrip(": "),
        fix=_how_to_go_on(run),
    )
    error.add_note(f"Traceback of rank {failure.rank}:\n{failure.traceback}")
    return error


def _hung(run: RunDir, hung: Failure, waiting: Failure) -> TrainingFailed:
    error = TrainingFailed(
        f"rank {hung.rank} hung at step {hung.step}",
        where=f"host {hung.host}, log {run.log(hung.rank)}",
        got=f"rank {waiting.rank} waited for it until its time ran out",
        fix=f"the log says what it was doing; {_how_to_go_on(run)}",
    )
    error.add_note(f"Stack of rank {hung.rank} when it was ended:\n{hung.traceback}")
    return error


def _vanished(run: RunDir, rank: RankFile) -> TrainingFailed:
    heartbeat = run.read_heartbeat(rank.rank)
    step = heartbeat.step if heartbeat else 0
    last = datetime.fromtimestamp(_last_sign(run, rank)).astimezone().isoformat(timespec="seconds")
    return TrainingFailed(
        f"rank {rank.rank} ended without a word at step {step}",
        where=f"host {rank.host}, process {rank.pid}, log {run.log(rank.rank)}",
        got=f"no record of an error, last heartbeat {last}: kill -9, out of memory, os._exit, or it hung",
        fix=_how_to_go_on(run),
    )


def _last_sign(run: RunDir, rank: RankFile) -> float:
    heartbeat = run.read_heartbeat(rank.rank)
    return heartbeat.time if heartbeat else rank.started_at


def _how_to_go_on(run: RunDir) -> str:
    checkpoints = run.finished_checkpoints()
    if not checkpoints:
        return "remove the cause and run the same command again (there is no checkpoint yet: it starts over)"
    return f"remove the cause and run the same command again: it goes on from {checkpoints[-1]}"

"""Diagnosis of a failed training run: find the root cause in the failure records of the ranks.

When one rank dies, all other ranks lose their connection to the dead rank, and the launcher terminates them. Most
failure records therefore describe consequences and not the cause. The first of these rules that applies gives the root
cause:
    1. The root cause is the earliest failure record that is not a consequence.
    2. If ranks timed out while they waited, the root cause is in the rank that was not waiting with them.
    3. If neither rule applies, the root cause is in a rank that has left no failure record.
If all ranks waited for each other, the fault is in the network between the ranks.
"""

from __future__ import annotations

import re
import socket
import time
from datetime import datetime

from pipelines.errors import LakesightError, TrainingFailed
from pipelines.formats.run_folder import Failure, RankFile, RunFolder
from pipelines.formats.shards import Shards

HUNG, WAITED = "Hung", "Waited"
"""Exception names in failure records of timeouts: HUNG for a rank that hung, WAITED for a rank that waited for
others."""

LAST_LOG_LINE = re.compile(r"Fatal Python error: .+|Timeout \(.+|rank {rank} ended at step .+")
"""Pattern of the log lines (of a rank or the launcher) that name the cause if the rank wrote no failure record."""

CRASH = re.compile(r"Fatal Python error: (?:Segmentation fault|Bus error)")
"""Pattern of the log lines of crashes that may have been caused by a truncated or overwritten memory-mapped file."""

VERIFY_SECONDS = 60.0
"""Time limit for verifying a shard folder after a crash, in seconds. Some tens of gigabytes can be verified in a
minute."""

LOST = re.compile(r"ExecutorLostFailure.*|Lost executor.*|executor \d+ (?:lost|exited).*")
"""Pattern of the messages in which Spark reports a lost executor."""

STACKS = "see the stack traces of each rank's threads in {}/rank-*.stacks.txt"

RECORD_SECONDS = 15.0
"""Time to wait for the failure records of ranks that are being terminated on other hosts, in seconds."""


def wait_for_failure_records(run: RunFolder) -> None:
    """Wait until a failure record names the root cause, or until no rank on another host can still write a record.

    The function waits at most RECORD_SECONDS.

    This function does not wait for ranks on this host, because `run_ranks` has already ended these ranks.
    """
    deadline = time.monotonic() + RECORD_SECONDS
    while time.monotonic() < deadline:
        if any(not failure.consequence for failure in run.read_failures()):
            return
        if all(rank.host == socket.gethostname() for rank in _ranks_without_record(run)):
            return
        time.sleep(0.2)


def root_failure(run: RunFolder) -> Failure | None:
    """Return the failure record of the root cause, or None if no rank has written such a record."""
    return next((failure for failure in run.read_failures() if not failure.consequence), None)


def diagnose_failure(run: RunFolder, world_size: int, launcher: BaseException | None) -> TrainingFailed:
    """Build the error that names the rank, host and cause of a failed run.

    Args:
        run: run folder, for which `wait_for_failure_records` has been called.
        world_size: number of ranks that were launched.
        launcher: exception raised by the launcher, if any.
    """
    failures, silent, root = run.read_failures(), _ranks_without_record(run), root_failure(run)
    waited = next((failure for failure in failures if failure.exception == WAITED), None)
    missed = [failure for failure in failures if failure.exception == "SIGTERM" and not failure.waiting]
    lost = LOST.search(str(launcher))
    if root:
        error = _hung(run, root, root.message) if root.exception == HUNG else _raised(run, root)
    elif waited and missed:
        error = _hung(run, missed[0], f"rank {waited.rank} {waited.message}")
    elif waited and silent:
        error = _missing(run, silent[0], waited)
    elif lost and (silent or failures):
        error = _executor_lost(run, silent, failures, lost[0])
    elif silent:
        error = _unexplained(run, silent[0])
    elif waited and len(run.read_ranks()) == world_size:
        error = _disconnected(run, failures, waited)
    elif waited:
        error = _too_few(run, world_size, f"rank {waited.rank} {waited.message}")
    elif failures:
        error = _raised(run, failures[0])
    else:
        error = _too_few(run, world_size, str(launcher or "the launcher reported no error"))
    for failure in failures:
        error.add_note(f"Rank {failure.rank} on {failure.host}, {failure.exception}:\n{failure.traceback}")
    return error


def _ranks_without_record(run: RunFolder) -> list[RankFile]:
    """Return the ranks that neither finished nor wrote a failure record, sorted by the time of their last heartbeat."""
    recorded = {failure.rank for failure in run.read_failures()}
    silent = [rank for rank in run.read_ranks() if not rank.ended and rank.rank not in recorded]
    return sorted(silent, key=lambda rank: _last_heartbeat(run, rank))


def _raised(run: RunFolder, failure: Failure) -> TrainingFailed:
    return TrainingFailed(
        f"rank {failure.rank} failed at step {failure.step}",
        where=f"host {failure.host}, log {run.log(failure.rank)}",
        got=f"{failure.exception}: {failure.message}".rstrip(": "),
        fix=_restart_hint(run),
    )


def _hung(run: RunFolder, rank: Failure, got: str) -> TrainingFailed:
    return TrainingFailed(
        f"rank {rank.rank} hung at step {rank.step}",
        where=f"host {rank.host}, log {run.log(rank.rank)}",
        got=got,
        fix=f"{STACKS.format(run.failures)}; {_restart_hint(run)}",
    )


def _missing(run: RunFolder, rank: RankFile, waited: Failure) -> TrainingFailed:
    """Describe a rank that wrote no failure record while other ranks waited for it. The rank may have been stuck."""
    log_line = _last_log_line(run, rank.rank)
    return TrainingFailed(
        f"rank {rank.rank} {'hung at' if log_line else 'has not responded since'} step {_last_step(run, rank.rank)}",
        where=f"host {rank.host}, log {run.log(rank.rank)}",
        got=f"rank {waited.rank} {waited.message}; "
        + (log_line or "the silent rank was stopped or called os._exit, or its host is down"),
        fix=f"{STACKS.format(run.failures)}; {_restart_hint(run)}",
    )


def _disconnected(run: RunFolder, failures: list[Failure], waited: Failure) -> TrainingFailed:
    """Describe a run whose ranks all waited for each other, because messages between them did not arrive."""
    hosts = sorted({failure.host for failure in failures})
    network = "the network between these hosts, on all ports" if len(hosts) > 1 else "the loopback device of this host"
    return TrainingFailed(
        f"the ranks lost their connections to each other at step {waited.step}",
        where=f"hosts {', '.join(hosts)}",
        got=f"rank {waited.rank} {waited.message}, and all other ranks waited too",
        fix=f"check {network}; {STACKS.format(run.failures)}; {_restart_hint(run)}",
    )


def _executor_lost(run: RunFolder, silent: list[RankFile], failures: list[Failure], message: str) -> TrainingFailed:
    """Describe a lost executor.

    The rank on the executor has either recorded that its launcher died, or recorded no failure at all.
    """
    orphaned = [failure for failure in failures if failure.exception == "LauncherGone"]
    rank = (orphaned or silent or failures)[0]
    return TrainingFailed(
        f"the executor of rank {rank.rank} was lost at step {_last_step(run, rank.rank)}",
        where=f"host {rank.host}, log {run.log(rank.rank)}",
        got=message[:500],
        fix=_restart_hint(run),
    )


def _unexplained(run: RunFolder, rank: RankFile) -> TrainingFailed:
    """Describe a rank that ended without a failure record, and verify the shards if the rank crashed."""
    last = datetime.fromtimestamp(_last_heartbeat(run, rank)).astimezone().isoformat(timespec="seconds")
    log_line, fix = _last_log_line(run, rank.rank), _restart_hint(run)
    if CRASH.search(log_line) and (damage := _damaged_shard(run)):
        log_line, fix = f"{log_line}; {damage.what}: {damage.where}, {damage.got}", f"{damage.fix}; {fix}"
    return TrainingFailed(
        f"rank {rank.rank} ended without a failure record at step {_last_step(run, rank.rank)}",
        where=f"host {rank.host}, process {rank.pid}, log {run.log(rank.rank)}",
        got=log_line
        or f"no error in the rank's log, last heartbeat {last}: the cause may be kill -9, out of memory, os._exit or "
        "a hang",
        fix=fix,
    )


def _damaged_shard(run: RunFolder) -> LakesightError | None:
    """Verify the shards of a run, each folder for at most VERIFY_SECONDS. Return the first error, or None."""
    files = run.read_run()
    try:
        for folder in dict.fromkeys((files.train_shards, files.validate_shards)):
            Shards.open(run.shard_folder(folder)).verify(VERIFY_SECONDS)
    except LakesightError as error:
        return error
    return None


def _too_few(run: RunFolder, world_size: int, message: str) -> TrainingFailed:
    last = message.strip().splitlines()[-1]
    return TrainingFailed(
        f"{len(run.read_ranks())} of {world_size} ranks started, and no rank wrote a result",
        where=f"host {socket.gethostname()}, log {run.launcher_log}",
        got=last[:500],
        fix="read the log; check that every host has this package installed and can see the run folder",
    )


def _last_log_line(run: RunFolder, rank: int) -> str:
    """Return the log line that says why a rank without a failure record ended, or an empty string."""
    pattern = re.compile(LAST_LOG_LINE.pattern.replace("{rank}", str(rank)))
    for path in (run.log(rank), run.launcher_log):
        found = pattern.findall(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else []
        if found:
            return str(found[-1])
    return ""


def _last_step(run: RunFolder, rank: int) -> int:
    """Return the last step that a rank is known to have taken.

    A heartbeat is written every few seconds, so the last checkpoint can be newer than the last heartbeat. All ranks
    have reached the step of the last checkpoint.
    """
    heartbeat = run.read_heartbeat(rank)
    return max(heartbeat.step if heartbeat else 0, run.last_checkpoint_step())


def _last_heartbeat(run: RunFolder, rank: RankFile) -> float:
    """Return the time of the last heartbeat of a rank, or the start time of a rank without a heartbeat."""
    heartbeat = run.read_heartbeat(rank.rank)
    return heartbeat.time if heartbeat else rank.started_at


def _restart_hint(run: RunFolder) -> str:
    """Return a sentence that says how to restart the run, and from which checkpoint the run resumes."""
    checkpoints = run.finished_checkpoints()
    if not checkpoints:
        return "fix the cause and repeat the same command (there is no checkpoint yet, so the run starts over)"
    return f"fix the cause and repeat the same command: the run resumes from {checkpoints[-1]}"

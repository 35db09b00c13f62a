"""Why a training run failed, from what its ranks left behind: the root, not the noise around it.

When one rank dies, the others lose their connection to it and the launcher ends them, so most records tell of
consequences. The root is the earliest record that is not one; else, where ranks waited until their time ran out, the
one that was not waiting with them; else a rank that left no word at all. Where all of them waited for each other it is
none of them, but what is between their hosts.
"""

from __future__ import annotations

import re
import socket
import time
from datetime import datetime
from pathlib import Path

from pipelines.errors import LakesightError, TrainingFailed
from pipelines.formats.run_folder import Failure, RankFile, RunDir
from pipelines.formats.shards import Shards

HUNG, WAITED = "Hung", "Waited"
"""What the watch over a rank calls it when nothing goes on: by the rank's own doing, or because others did not come."""

LAST_WORDS = re.compile(r"Fatal Python error: .+|Timeout \(.+|rank {rank} ended at step .+")
"""How a rank that could leave no record says on its log, or on the launcher's, what ended it."""

CRASH = re.compile(r"Fatal Python error: (?:Segmentation fault|Bus error)")
"""What ends a rank that reads a mapped file which was cut off or written over, among other things."""

VERIFY_SECONDS = 60.0
"""How long shards are looked at then: some tens of gigabytes."""

LOST = re.compile(r"ExecutorLostFailure.*|Lost executor.*|executor \d+ (?:lost|exited).*")
"""How Spark says that the process around a rank is gone."""

STACKS = "where each thread of each rank was is in {}/rank-*.stacks.txt"

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


def root_of(run: RunDir) -> Failure | None:
    """The record that names the cause; None where no rank has left one."""
    return next((failure for failure in run.read_failures() if not failure.consequence), None)


def failure_of(run: RunDir, world_size: int, launcher: BaseException | None) -> TrainingFailed:
    """The error that names rank, host and cause.

    Args:
        run: the run, after the launcher has returned and every rank had its chance to speak.
        world_size: ranks that should have been there.
        launcher: what the launcher raised, if it did.
    """
    failures, silent, root = run.read_failures(), _silent(run), root_of(run)
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
        error = _lost(run, silent, failures, lost[0])
    elif silent:
        error = _vanished(run, silent[0])
    elif waited and len(run.read_ranks()) == world_size:
        error = _apart(run, failures, waited)
    elif waited:
        error = _too_few(run, world_size, f"rank {waited.rank} {waited.message}")
    elif failures:
        error = _raised(run, failures[0])
    else:
        error = _too_few(run, world_size, str(launcher or "no word from the launcher"))
    for failure in failures:
        error.add_note(f"Rank {failure.rank} on {failure.host}, {failure.exception}:\n{failure.traceback}")
    return error


def _silent(run: RunDir) -> list[RankFile]:
    """Ranks that started and left no word on how they ended, the one first that was silent first."""
    told = {failure.rank for failure in run.read_failures()}
    silent = [rank for rank in run.read_ranks() if not rank.ended and rank.rank not in told]
    return sorted(silent, key=lambda rank: _last_sign(run, rank))


def _raised(run: RunDir, failure: Failure) -> TrainingFailed:
    return TrainingFailed(
        f"rank {failure.rank} failed at step {failure.step}",
        where=f"host {failure.host}, log {run.log(failure.rank)}",
        got=f"{failure.exception}: {failure.message}".rstrip(": "),
        fix=_how_to_go_on(run),
    )


def _hung(run: RunDir, rank: Failure, got: str) -> TrainingFailed:
    return TrainingFailed(
        f"rank {rank.rank} hung at step {rank.step}",
        where=f"host {rank.host}, log {run.log(rank.rank)}",
        got=got,
        fix=f"{STACKS.format(run.failures)}; {_how_to_go_on(run)}",
    )


def _missing(run: RunDir, rank: RankFile, waited: Failure) -> TrainingFailed:
    """A rank that others waited for, and that could not be asked: its interpreter was stuck, or all of it was."""
    words = _last_words(run, rank.rank)
    return TrainingFailed(
        f"rank {rank.rank} {'hung at' if words else 'is missing since'} step {_last_step(run, rank.rank)}",
        where=f"host {rank.host}, log {run.log(rank.rank)}",
        got=f"rank {waited.rank} {waited.message}; "
        + (words or "no word of its own: it was stopped, left by os._exit, or its host is gone"),
        fix=f"{STACKS.format(run.failures)}; {_how_to_go_on(run)}",
    )


def _apart(run: RunDir, failures: list[Failure], waited: Failure) -> TrainingFailed:
    """All ranks waited, and each had its say: what they send each other did not arrive."""
    hosts = sorted({failure.host for failure in failures})
    between = "the network between these hosts, at any port" if len(hosts) > 1 else "loopback on this host"
    return TrainingFailed(
        f"the ranks lost each other at step {waited.step}",
        where=f"hosts {', '.join(hosts)}",
        got=f"rank {waited.rank} {waited.message}, and all others waited too",
        fix=f"look at {between}; {STACKS.format(run.failures)}; {_how_to_go_on(run)}",
    )


def _lost(run: RunDir, silent: list[RankFile], failures: list[Failure], words: str) -> TrainingFailed:
    """A rank whose executor is gone says that its launcher went, or nothing."""
    gone = [failure for failure in failures if failure.exception == "LauncherGone"]
    rank = (gone or silent or failures)[0]
    return TrainingFailed(
        f"the executor of rank {rank.rank} was lost at step {_last_step(run, rank.rank)}",
        where=f"host {rank.host}, log {run.log(rank.rank)}",
        got=words[:500],
        fix=_how_to_go_on(run),
    )


def _vanished(run: RunDir, rank: RankFile) -> TrainingFailed:
    last = datetime.fromtimestamp(_last_sign(run, rank)).astimezone().isoformat(timespec="seconds")
    words, fix = _last_words(run, rank.rank), _how_to_go_on(run)
    if CRASH.search(words) and (damage := _damaged_shard(run)):
        words, fix = f"{words}; {damage.what}: {damage.where}, {damage.got}", f"{damage.fix}; {fix}"
    return TrainingFailed(
        f"rank {rank.rank} ended without a word at step {_last_step(run, rank.rank)}",
        where=f"host {rank.host}, process {rank.pid}, log {run.log(rank.rank)}",
        got=words or f"no record of an error, last heartbeat {last}: kill -9, out of memory, os._exit, or it hung",
        fix=fix,
    )


def _damaged_shard(run: RunDir) -> LakesightError | None:
    """What is wrong with the first damaged file of the run's shards."""
    files = run.read_run()
    try:
        for folder in dict.fromkeys((files.train_shards, files.validate_shards)):
            Shards.open(Path(folder)).verify(VERIFY_SECONDS)
    except LakesightError as error:
        return error
    return None


def _too_few(run: RunDir, world_size: int, words: str) -> TrainingFailed:
    last = words.strip().splitlines()[-1]
    return TrainingFailed(
        f"{len(run.read_ranks())} of {world_size} ranks started, and there is no result",
        where=f"host {socket.gethostname()}, log {run.launcher_log}",
        got=last[:500],
        fix="the log has what the launcher said; every host needs this package and sees the run folder",
    )


def _last_words(run: RunDir, rank: int) -> str:
    """What a rank without a record has said on its log, or on the launcher's where it could not write any more."""
    pattern = re.compile(LAST_WORDS.pattern.replace("{rank}", str(rank)))
    for path in (run.log(rank), run.launcher_log):
        found = pattern.findall(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else []
        if found:
            return str(found[-1])
    return ""


def _last_step(run: RunDir, rank: int) -> int:
    """The last step a rank is known to have done: heartbeats are a second apart, and a checkpoint is of all ranks."""
    heartbeat = run.read_heartbeat(rank)
    return max(heartbeat.step if heartbeat else 0, run.checkpointed_step())


def _last_sign(run: RunDir, rank: RankFile) -> float:
    heartbeat = run.read_heartbeat(rank.rank)
    return heartbeat.time if heartbeat else rank.started_at


def _how_to_go_on(run: RunDir) -> str:
    checkpoints = run.finished_checkpoints()
    if not checkpoints:
        return "remove the cause and run the same command again (there is no checkpoint yet: it starts over)"
    return f"remove the cause and run the same command again: it goes on from {checkpoints[-1]}"

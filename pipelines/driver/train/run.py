"""Train: resolve a run into a folder, start its ranks on it, and believe only what the folder says afterwards."""

from __future__ import annotations

import logging
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.config import RunConfig, short_hash
from pipelines.driver.train.failure import failure_of, root_of, wait_for_words
from pipelines.driver.train.hosts import check_hosts
from pipelines.driver.train.launch import RankEntry, check_slots, only_launch, run_rank, start_ranks
from pipelines.driver.train.start_from import open_start
from pipelines.errors import StageFailed, TrainingFailed, UserError
from pipelines.formats.run_folder import Failure, Result, RunDir, RunFile, read_json, write_json
from pipelines.formats.shards import Shards
from pipelines.platform import Launch, Platform
from vlm import text
from vlm.config import config_differences
from vlm.files import atomic_write

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from pipelines.driver.shard import ShardReport

log = logging.getLogger(__name__)

RETURN_SECONDS = 120.0
"""How long a cluster may take to replace an executor that was lost."""


def prepare(config: RunConfig, platform: Platform, train: ShardReport, validate: ShardReport) -> RunDir:
    """Write the run folder: run.json and the tokenizer, learned from the texts of the training shards, or the one of
    the weights that the run starts from.

    The folder's name is a hash of what determines the outcome, so the same command finds the same run: finished, or to
    be gone on with.

    Raises:
        UserError: nothing to learn from or to validate on, a batch that cannot be shared among the ranks, or a folder
            to start from that does not hold the run's model.
    """
    _refuse(config, train, validate)
    code = version("lakesight")
    settings, start = config.train.science(), None
    if config.train.start_from:
        start = open_start(Path(config.train.start_from), config.model)
        settings["start_from"] = start.digest  # what is in the folder, not where it lies
        resolved = config.train.model_copy(update={"start_from": str(start.folder)})
        config = config.model_copy(update={"train": resolved})
    identity = short_hash(config.model.model_dump(), settings, train.content_hash, validate.content_hash, code)
    run = RunDir(platform.folder("runs") / f"{config.name}-{identity}")
    if not run.run.exists():
        _tell_unfinished(run, config)
    if not run.tokenizer.exists():
        learned_from = Shards.open(Path(train.folder))
        tokenizer = text.load(start.tokenizer) if start else text.learn(config.model.text, learned_from.texts())
        with atomic_write(run.tokenizer) as temporary:
            text.save(tokenizer, temporary)
    if finished(run) is None:
        write_json(
            run.run,
            RunFile(
                config=config,
                code_version=code,
                train_shards=str(train.folder),
                validate_shards=str(validate.folder),
                dataset_version=train.dataset_version,
                content_hash=train.content_hash,
                world_size=platform.launch.ranks,
            ),
        )
    return run


def _tell_unfinished(run: RunDir, config: RunConfig) -> None:
    """A new run: say how it differs from the newest unfinished one of its name, which is not gone on with."""
    others = [RunDir(path) for path in run.path.parent.glob(f"{config.name}-*") if (path / "run.json").exists()]
    started = [other for other in others if finished(other) is None and other.finished_checkpoints()]
    if not started:
        return
    other = max(started, key=lambda each: each.run.stat().st_mtime)
    before = other.read_run().config
    there, here = ({"model": c.model.model_dump(), "train": c.train.science()} for c in (before, config))
    found = "; ".join(config_differences(there, here)) or "the data, or the code, is another"
    log.warning("a new run: %s is unfinished, and not gone on with: %s", other.path.name, found)


def finished(run: RunDir) -> Result | None:
    """The result of a run that has ended well."""
    if not run.result.exists():
        return None
    result = read_json(run.result, Result)
    return result if run.checkpoint(result.step).is_dir() else None


def launch(run: RunDir, platform: Platform, spark: SparkSession, entry: RankEntry = run_rank) -> Result:
    """Train on the platform's ranks, from the run's last checkpoint to its end; start again what may go better then.

    Args:
        run: a folder made by `prepare`.
        platform: says how many ranks start, where, and on what.
        spark: the session whose executors the ranks run on, or beside.
        entry: what each rank runs, importable by name in the rank.

    Raises:
        UserError: too few slots, hosts on which ranks could not work, or another process is training this run; nothing
            was started.
        TrainingFailed: names the root rank, its host and the cause; or the executors cannot be asked what they have.
        KeyboardInterrupt: the ranks have been ended; the same run can be launched again.
    """
    check_slots(spark, platform.launch)
    restarts, before = 0, None
    with only_launch(run):
        while True:
            try:
                return _attempt(run, platform.launch, spark, entry)
            except TrainingFailed as error:
                root = root_of(run)
                if reason := why_not_again(root, before, restarts, run.read_run().config.train.max_restarts):
                    error.add_note(f"Started {restarts + 1} times; not again: {reason}")
                    raise
                log.warning("%s Starting again (%d).", error, restarts + 1)
            check_slots(spark, platform.launch, RETURN_SECONDS)
            restarts, before = restarts + 1, root


def why_not_again(root: Failure | None, before: Failure | None, restarts: int, allowed: int) -> str:
    """Why a failed run is not worth another start; empty if it is.

    Args:
        root: what the failed attempt has left on its cause, if anything.
        before: the same of the attempt before it.
        restarts: how often the run was started again already.
        allowed: how often it may be.
    """
    if root and root.lasting:
        return "it would fail in the same way until its cause is removed"
    if root and before and (root.exception, root.step) == (before.exception, before.step):
        return f"{root.exception} at step {root.step} came twice"
    return f"train.max_restarts is {allowed}" if restarts >= allowed else ""


def _attempt(run: RunDir, how: Launch, spark: SparkSession, entry: RankEntry) -> Result:
    run.set_aside()
    try:
        check_hosts(run, spark, how)
    except StageFailed as gone:  # an executor, while it was asked: another may be there for the next attempt
        raise TrainingFailed(gone.what, where=gone.where, got=gone.got, fix=gone.fix) from gone
    damaged = set(run.damaged_checkpoints())
    error = start_ranks(run, spark, how, entry)
    for folder in sorted({*run.damaged_checkpoints()} - damaged):
        log.warning("a checkpoint was damaged and is put aside: %s; an earlier one was gone on from", folder)
    result = finished(run)
    if result is None:
        wait_for_words(run)
        raise failure_of(run, how.ranks, error) from error
    if result.world_size != how.ranks:
        raise StageFailed(
            "the ranks did not form one group",
            where=str(run.result),
            got=f"a result of {result.world_size} ranks",
            fix=f"{how.ranks} were started; this is a defect of the launcher or of the network",
        )
    if error is not None:
        log.warning("the run is finished, but the launcher reported an error afterwards: see %s", run.launcher_log)
    return result


def _refuse(config: RunConfig, train: ShardReport, validate: ShardReport) -> None:
    ranks, batch_size = config.platform.ranks, config.train.batch_size
    if batch_size % ranks:
        raise UserError(
            "the global batch cannot be shared among the ranks",
            where="train.batch_size, platform.ranks",
            got=f"{batch_size} rows for {ranks} ranks",
            fix=f"for example --set train.batch_size={ranks * -(-batch_size // ranks)}",
        )
    for purpose, report in (("learn from", train), ("validate on", validate)):
        if not report.num_rows:
            raise UserError(
                f"there is nothing to {purpose}",
                where=str(report.folder),
                got="no rows",
                fix="`lakesight ingest` reports why rows are missing; data.split says how many go where",
            )

"""The driver's part of training: prepare the run folder, launch the ranks, and read the result of the run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.config import RunConfig
from pipelines.driver.train.code import read_code
from pipelines.driver.train.failure import diagnose_failure, root_failure, wait_for_failure_records
from pipelines.driver.train.hosts import check_hosts
from pipelines.driver.train.launch import check_slots, end_leftover_ranks, run_rank, run_ranks
from pipelines.driver.train.local_ranks import RankEntry
from pipelines.driver.train.precision import choose_precision, with_each_precision
from pipelines.driver.train.run_folders import (
    check_registered_step,
    earlier_code,
    find_folder,
    finished_result,
    hash_run,
    keep_generation,
)
from pipelines.driver.train.start_from import (
    StartFolder,
    check_start_folder,
    check_training_state,
    open_start_folder,
    require_intact,
    require_same_data,
)
from pipelines.driver.train.vocabulary import warn_of_unknown
from pipelines.errors import StageFailed, TrainingFailed, UserError
from pipelines.formats.run_files.token_file import TRAIN_TOKENS, VALIDATE_TOKENS, write_tokens
from pipelines.formats.run_folder import Failure, Result, RunFile, RunFolder, write_json
from pipelines.formats.run_owner import own_run
from pipelines.formats.shards import Shards
from pipelines.formats.training_code import TrainingCode
from pipelines.platform import Launch, Platform
from vlm import text
from vlm.files import atomic_write, read_training_step
from vlm.text.cider import Cider, rewarded_words

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from pipelines.driver.shard.run import ShardReport

log = logging.getLogger(__name__)

RETURN_SECONDS = 120.0
"""Maximum time, in seconds, that a restart of the run waits for the cluster to replace a lost executor."""


class Located(NamedTuple):
    """Run whose settings are all chosen.

    Attributes:
        config: resolved run config.
        start: opened folder in `train.start_from`, or None.
        path: path of the run folder for the first version of the training code that trains the run.
    """

    config: RunConfig
    start: StartFolder | None
    path: Path


def prepare(
    config: RunConfig,
    platform: Platform,
    train: ShardReport,
    validate: ShardReport,
    code: TrainingCode | None = None,
    *,
    keep_run_file: bool = False,
) -> RunFolder:
    """Find or create the run folder, and write the files that ranks need before they start.

    These files are run.json and the files of `_write_text_files`. The tokenizer is trained on the texts of the training
    shards, or copied from `train.start_from`. A repeated command finds the same run folder, in most cases even if the
    command changes generation settings (`keep_generation`).

    Args:
        config: resolved run config.
        platform: platform that stores the run folder, and that says how many ranks to launch.
        train: report on the training shards.
        validate: report on the validation shards.
        code: description of the training code, by default of the installed code.
        keep_run_file: whether an existing run.json is left unchanged, because the command does not train the run.

    Raises:
        UserError: a split has no rows, the batch cannot be divided among the ranks, or another process is training the
            run. The error is also raised if the checkpoint in `train.start_from` is damaged, has another model or was
            trained on other data, or if the run will write no checkpoint of the step in `train.register`.
    """
    check_config(config)
    _check_splits(train, validate)
    code = code or read_code()
    config, start, path = _locate_run(config, platform, (train.content_hash, validate.content_hash), code)
    run = find_folder(path, config, code)
    is_finished = finished_result(run) is not None
    if run.tokenizer.exists() and (is_finished or (keep_run_file and run.run_file.exists())):
        return run
    _check_before_training(run, config, start, train.content_hash)
    file = RunFile(
        config=config,
        code_version=code.release,
        code=code,
        train_shards=_stored_path(train.folder, run, platform),
        validate_shards=_stored_path(validate.folder, run, platform),
        dataset_version=train.dataset_version,
        content_hash=train.content_hash,
        world_size=platform.launch.ranks,
    )
    with own_run(run):
        _write_text_files(run, config, train, validate, start)
        if finished_result(run) is None:
            write_json(run.run_file, file.model_copy(update={"earlier_code": earlier_code(run, code)}))
    return run


def _locate_run(config: RunConfig, platform: Platform, content: tuple[str, str], code: TrainingCode) -> Located:
    """Choose the number format if `train.precision` is `auto`, and return the run.

    An existing run with equal settings decides the format, as does the training that the run continues
    (`train.start_state`). Otherwise, a repeated command on another kind of processor or GPU would train a second run.
    If neither decides, the faster format is chosen (`choose_precision`).
    """
    if config.train.precision != "auto":
        return _locate(config, platform, content, code)
    possible, errors = [], []
    for each in with_each_precision(config):
        try:
            possible.append(_locate(each, platform, content, code))
        except UserError as error:
            errors.append(error)
    # Only the training that the run continues can make one of the formats impossible.
    if errors and not (possible and config.train.start_state == "training"):
        raise errors[0]
    if len(possible) == 1:
        precision = possible[0].config.train.precision
        log.info("train.precision auto is %s, as in the training that the run continues", precision)
        return possible[0]
    known = [run for run in possible if RunFolder(run.path).run_file.exists()]
    if len(known) == 1:
        precision = known[0].config.train.precision
        log.info("train.precision auto is %s, as in the existing run %s", precision, known[0].path.name)
        return known[0]
    chosen = choose_precision(config, platform).train.precision
    return next(run for run in possible if run.config.train.precision == chosen)


def _locate(config: RunConfig, platform: Platform, content: tuple[str, str], code: TrainingCode) -> Located:
    """Open the start folder, choose the generation settings (`keep_generation`), and return the run."""
    settings = config.train.science()
    config, start = _open_start(config, settings)

    def path_of(config: RunConfig) -> Path:
        return _run_path(platform, config, settings, start, content)

    config = keep_generation(config, code, path_of)
    return Located(config, start, path_of(config))


def _open_start(config: RunConfig, settings: dict[str, Any]) -> tuple[RunConfig, StartFolder | None]:
    """Open the folder in `train.start_from`, if any. Return the config with the absolute path, and the opened folder.

    The outcome of the run depends on the files of the folder, not on its path, so this function adds the digest of the
    files to `settings`.
    """
    if not config.train.start_from:
        return config, None
    start = open_start_folder(Path(config.train.start_from), config.model, config.train)
    settings["start_from"] = start.digest
    if config.train.start_state == "training":
        settings["start_state"] = check_training_state(start, config.train)
    resolved = config.train.model_copy(update={"start_from": str(start.folder)})
    return config.model_copy(update={"train": resolved}), start


def _check_before_training(run: RunFolder, config: RunConfig, start: StartFolder | None, content_hash: str) -> None:
    """Check the start folder and the step to register, before the files of the run are written."""
    first_step = 0
    if start:
        require_intact(start.folder)
        if config.train.start_state == "training":
            first_step = read_training_step(start.folder)
            if not run.finished_checkpoints():
                require_same_data(start, content_hash)
    if finished_result(run) is None:
        check_registered_step(run, config.train, first_step)


def _run_path(
    platform: Platform,
    config: RunConfig,
    settings: Mapping[str, Any],
    start: StartFolder | None,
    content: tuple[str, str],
) -> Path:
    """Return the path of the run folder for the first version of the training code that trains the run.

    The name of the folder contains a hash of everything that determines the outcome of the run, except the training
    code. `find_folder` returns the folder for the present version of the code.

    Args:
        platform: platform that stores the run folder.
        config: resolved run config.
        settings: training settings that determine the outcome.
        start: opened folder in `train.start_from`, or None.
        content: content hashes of the training shards and of the validation shards.
    """

    def path_with(settings: Mapping[str, Any]) -> Path:
        return platform.folder("runs") / f"{config.name}-{hash_run(config.model, settings, *content)}"

    if start is not None:
        # Earlier releases left the tokenizer out of the name. Their runs are found if the tokenizer is the same.
        earlier = path_with({**settings, "start_from": start.weights})
        if start.has_tokenizer_of(RunFolder(earlier)):
            return earlier
    return path_with(settings)


def _write_text_files(
    run: RunFolder, config: RunConfig, train: ShardReport, validate: ShardReport, start: StartFolder | None
) -> None:
    """Write the tokenizer, the token files of a text-only model, and the document frequencies if a stage rewards CIDEr.

    Existing files are kept.
    """
    shards = Shards.open(Path(train.folder))
    if not run.tokenizer.exists():
        tokenizer = text.load(start.tokenizer) if start else text.learn(config.model.text, shards.texts())
        warn_of_unknown(tokenizer, shards.texts(), "training texts")
        if validate.folder != train.folder:
            warn_of_unknown(tokenizer, Shards.open(Path(validate.folder)).texts(), "validation texts")
        with atomic_write(run.tokenizer) as temporary:
            text.save(tokenizer, temporary)
    if config.model.text_only:
        for name, report in ((TRAIN_TOKENS, train), (VALIDATE_TOKENS, validate)):
            path = run.path / name
            if not path.with_suffix(".json").exists():
                write_tokens(path, Shards.open(Path(report.folder)).texts(), text.load(run.tokenizer))
    if config.train.rewards_cider and not run.cider.exists():
        with atomic_write(run.cider) as temporary:
            Cider.count(reference_documents(shards)).save(temporary)


def reference_documents(shards: Shards) -> Iterator[list[list[str]]]:
    """For each training picture and prompt, yield the references as lists of words."""
    for index in range(len(shards)):
        texts = shards.texts_of(index)
        for prompt in dict.fromkeys(prompt for prompt, _ in texts):
            yield [rewarded_words(text) for other, text in texts if other == prompt]


def _stored_path(folder: str, run: RunFolder, platform: Platform) -> str:
    """Return the path of a shard folder for run.json: relative to the run folder if both are in the home folder."""
    inside = Path(folder).is_relative_to(platform.root)
    return os.path.relpath(folder, run.path) if inside else folder


def launch(
    run: RunFolder, platform: Platform, open_spark: Callable[[], SparkSession], entry: RankEntry = run_rank
) -> Result:
    """Train from the last checkpoint to the end of the run, and restart the ranks after transient failures.

    The caller must own the run (`run_owner.own_run`), because ranks of two launches would overwrite the same files.

    Args:
        run: run folder made by `prepare`.
        platform: number, location and device of the ranks.
        open_spark: function that returns the Spark session whose executors run the ranks. In local mode, the driver's
            host runs the ranks, and the function is not called.
        entry: function that each rank runs; each rank imports the function by name.

    Raises:
        UserError: the cluster has too few slots, or the hosts are not compatible (`check_hosts`). No rank is running.
        TrainingFailed: a rank failed, or the executors could not describe their hosts before the start of the ranks.
            The message names the cause, and the rank and its host if they are known.
        StageFailed: the ranks have formed more than one process group.
        KeyboardInterrupt: the user interrupted the run. The ranks have been ended, and the run can be launched again.
    """
    check_slots(open_spark, platform.launch)
    restarts, previous = 0, None
    while True:
        try:
            return _run_attempt(run, platform.launch, open_spark, entry)
        except TrainingFailed as error:
            root = root_failure(run)
            if reason := reason_not_to_restart(root, previous, restarts, run.read_run().config.train.max_restarts):
                error.add_note(f"Training attempts: {restarts + 1}. Training was not restarted again, because {reason}")
                raise
            log.warning("%s Restarting (%d).", error, restarts + 1)
        check_slots(open_spark, platform.launch, RETURN_SECONDS)
        restarts, previous = restarts + 1, root


def reason_not_to_restart(root: Failure | None, previous: Failure | None, restarts: int, allowed: int) -> str:
    """Return why a failed run must not be restarted, or an empty string if the run may be restarted.

    Args:
        root: failure record with the root cause of the failed attempt, if there is such a record.
        previous: failure record with the root cause of the attempt before, if there is such a record.
        restarts: number of restarts so far.
        allowed: largest number of restarts.
    """
    if root and root.permanent:
        return "the run would fail in the same way until its cause is fixed"
    if root and previous and (root.exception, root.step) == (previous.exception, previous.step):
        return f"{root.exception} at step {root.step} occurred twice"
    return f"train.max_restarts is {allowed}" if restarts >= allowed else ""


def _run_attempt(run: RunFolder, settings: Launch, open_spark: Callable[[], SparkSession], entry: RankEntry) -> Result:
    """Run all ranks once and return the result of the run.

    Raises:
        TrainingFailed: the ranks wrote no result. The message names the cause.
        StageFailed: the ranks have formed more than one process group, so each group has trained a model of its own.
    """
    end_leftover_ranks(run)  # the ranks of a killed driver may need a second to notice that the driver has ended
    run.archive_attempt()
    try:
        check_hosts(run, open_spark, settings)
    except StageFailed as lost:  # an executor was lost; the next attempt may get a new executor
        raise TrainingFailed(lost.what, where=lost.where, got=lost.got, fix=lost.fix) from lost
    damaged = set(run.damaged_checkpoints())
    error = run_ranks(run, open_spark, settings, entry)
    for folder in sorted({*run.damaged_checkpoints()} - damaged):
        log.warning("a damaged checkpoint was renamed to %s; the run resumed from an earlier checkpoint", folder)
    result = finished_result(run)
    if result is None:
        wait_for_failure_records(run)
        raise diagnose_failure(run, settings.ranks, error) from error
    if result.world_size != settings.ranks:
        raise StageFailed(
            "the ranks did not form one group",
            where=str(run.result),
            got=f"{settings.ranks} ranks were started, but a group of {result.world_size} ranks wrote the result",
            fix="check the network between the hosts, then repeat the command",
        )
    if error is not None:
        log.warning("the run is finished, but the launcher has reported an error: see %s", run.launcher_log)
    return result


def check_config(config: RunConfig) -> None:
    """Before Spark starts, check the settings that do not depend on the shards.

    Raises:
        UserError: the batch cannot be divided among the ranks, or `train.start_from` does not contain the run's model.
    """
    ranks, batch_size = config.platform.ranks, config.train.batch_size
    if batch_size % ranks:
        raise UserError(
            "the global batch cannot be divided equally among the ranks",
            where="train.batch_size, platform.ranks",
            got=f"batch size {batch_size} for {ranks} ranks",
            fix=f"choose another batch size, for example with --set train.batch_size={ranks * -(-batch_size // ranks)}",
        )
    if config.train.start_from:
        check_start_folder(Path(config.train.start_from), config.model, config.train)


def _check_splits(train: ShardReport, validate: ShardReport) -> None:
    """Check that the training split and the validation split have rows."""
    for purpose, report in (("train on", train), ("validate on", validate)):
        if not report.num_rows:
            raise UserError(
                f"there are no rows to {purpose}",
                where=str(report.folder),
                got="0 rows",
                fix="read in the report of `lakesight ingest` why rows are missing, or change the shares of data.split",
            )

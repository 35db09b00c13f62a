"""Choice of the folder in which a run trains. Everything that determines the outcome of a run also determines the run's
folder.

The name of a folder contains a hash of the model, the settings and the data. The first version of the training code
that trains a run uses this name without a further hash, as Lakesight 0.1.0 did. Any other version of the code appends
its digest to the name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipelines.config import RunConfig, TrainConfig, short_hash
from pipelines.driver.train.known_generations import read_generations
from pipelines.errors import UserError
from pipelines.formats.run_folder import Result, RunFile, RunFolder, read_json, step_of, write_json
from pipelines.formats.training_code import TrainingCode
from vlm.config import ModelConfig, config_differences

log = logging.getLogger(__name__)

NAMING = "0.1.0"
"""Text that is part of the input of every hash in the name of a run folder. Never change this text, because existing
runs would no longer be found."""
SHOWN_FILES = 5


def hash_run(model: ModelConfig, settings: Mapping[str, Any], train: str, validate: str) -> str:
    """Return one hash of a run's model, the run's settings, and the content hashes of the run's shards."""
    return short_hash(model.hashed_settings(), settings, train, validate, NAMING)


def keep_generation(config: RunConfig, code: TrainingCode, path_of: Callable[[RunConfig], Path]) -> RunConfig:
    """Replace the generation settings of a config by those of a run that has learned, or is learning, the same model.

    Generation settings affect what a run learns only if training scores or rewards captions. The hash in the name of a
    run folder always depends on generation settings, as in Lakesight 0.1.0.

    Args:
        config: resolved run config.
        code: code that trains the run now.
        path_of: function that returns the path of a config's run folder.

    Returns:
        The config. The config is unchanged in three cases: training scores or rewards captions, no run has learned the
        same model, or a run with the config's own generation settings exists.
    """
    own, train = path_of(config), config.train
    if train.rewards_cider or train.score_every or _has_run(own, code):
        return config
    for generation in read_generations(own.parent, config.name):
        other = config.model_copy(update={"model": config.model.model_copy(update={"generation": generation})})
        try:
            if _has_run(path_of(other), code):
                return other
        except (UserError, OSError):
            continue  # skip a folder of another program or of an incompatible version
    return config


def _has_run(path: Path, code: TrainingCode) -> bool:
    """Return whether this version of the code has a run at the path, or at the path with the digest of the code."""
    first, own = RunFolder(path), RunFolder(path.with_name(f"{path.name}-{code.digest}"))
    if not first.run_file.exists():
        return False
    trained_by = first.read_run().code
    return trained_by is None or trained_by.digest == code.digest or own.run_file.exists()


def find_folder(path: Path, config: RunConfig, code: TrainingCode) -> RunFolder:
    """Return the existing or new run folder of a run, and log why an unfinished run is not resumed.

    A folder of Lakesight 0.1.0 does not say which code trained the run. The first version of the code that finds a
    finished run in a folder of Lakesight 0.1.0 writes its own description into run.json. The version that has written
    its description then counts as the code of the run.

    Args:
        path: path of the run folder for the first version of the training code.
        config: resolved run config.
        code: description of the code that trains the run now.
    """
    first, own = RunFolder(path), RunFolder(path.with_name(f"{path.name}-{code.digest}"))
    if not first.run_file.exists():
        _warn_of_unfinished_run(path.parent, config, code)
        return first
    file = first.read_run()
    if file.code is None and finished_result(first) is not None:
        adopted = {"code": code, "earlier_code": (file.code_version,)}
        write_json(first.run_file, file.model_copy(update=adopted))
    if file.code is None or file.code.digest == code.digest:
        return first
    if own.run_file.exists():
        return own
    if config.train.resume_changed_code and (resumed := _newest_unfinished(path.parent, path.name)):
        log.warning(
            "resuming training run %s with changed code: %s", resumed.path.name, _changed_code(resumed.read_run(), code)
        )
        return resumed
    _warn_of_unfinished_run(path.parent, config, code)
    return own


def earlier_code(run: RunFolder, code: TrainingCode) -> tuple[str, ...]:
    """Return the digests of all earlier versions of the training code that have trained this run (for run.json).

    If Lakesight 0.1.0 has trained the run, its release number takes the place of a digest.
    """
    if not run.run_file.exists() or not run.finished_checkpoints():
        return ()
    before = run.read_run()
    last = before.code.digest if before.code else before.code_version
    return tuple(dict.fromkeys(known for known in (*before.earlier_code, last) if known != code.digest))


def finished_result(run: RunFolder) -> Result | None:
    """Return the result of a finished run, or None if the run is not finished or the last checkpoint is missing."""
    if not run.result.exists():
        return None
    result = read_json(run.result, Result)
    return result if run.checkpoint(result.step).is_dir() else None


def _newest_unfinished(folder: Path, name: str) -> RunFolder | None:
    """Return the newest run that has a checkpoint but no result, or None if there is no such run.

    The name of each run folder consists of `name` and up to two hashes.
    """
    folders = sorted(folder.iterdir()) if folder.is_dir() else []
    runs = [RunFolder(path) for path in folders if re.fullmatch(f"{re.escape(name)}(-[0-9a-f]+){{0,2}}", path.name)]
    unfinished = [
        run for run in runs if run.run_file.exists() and finished_result(run) is None and run.finished_checkpoints()
    ]
    return max(unfinished, key=lambda run: run.run_file.stat().st_mtime, default=None)


def _warn_of_unfinished_run(folder: Path, config: RunConfig, code: TrainingCode) -> None:
    """Log how a new run differs from the newest unfinished run of the same name. The unfinished run is not resumed.

    The new run also starts if another program or an incompatible version of Lakesight wrote one of the run folders.
    """
    try:
        unfinished = _newest_unfinished(folder, config.name)
        if unfinished is None:
            return
        file = unfinished.read_run()
    except (UserError, OSError) as error:
        log.warning(
            "starting a new training run; an earlier run folder of %s cannot be resumed: %s", config.name, error
        )
        return
    before, now = ({"model": c.model.model_dump(), "train": c.train.science()} for c in (file.config, config))
    changes = list(config_differences(before, now))
    if not changes and file.code is not None and file.code.digest != code.digest:
        changes = [
            _changed_code(file, code),
            "to resume the unfinished run with the changed code, add --set train.resume_changed_code=true",
        ]
    differences = "; ".join(changes) or "the data has changed"
    log.warning(
        "starting a new training run; the unfinished run %s is not resumed: %s", unfinished.path.name, differences
    )


def _changed_code(file: RunFile, code: TrainingCode) -> str:
    """Return a sentence that names the source files that have changed since a run was trained."""
    files = file.code.different_files(code) if file.code else []
    more = f" and {len(files) - SHOWN_FILES} more" if len(files) > SHOWN_FILES else ""
    return f"the training code has changed in {', '.join(files[:SHOWN_FILES])}{more}"


def check_registered_step(run: RunFolder, settings: TrainConfig, first_step: int) -> None:
    """Before an unfinished run is trained, check that it will have the checkpoint of the step in `train.register`.

    Args:
        run: run folder.
        settings: training settings of the run.
        first_step: number of steps of the earlier training that a new run continues, or 0.

    Raises:
        UserError: the step is after the end of the run, the step is not after `first_step`, or an earlier command has
            already passed the step without a checkpoint.
    """
    step, steps = settings.register_, settings.steps
    if not isinstance(step, int):
        return
    saved = [step_of(folder) for folder in run.finished_checkpoints()]
    if step > steps or (step not in saved and step <= max(saved, default=first_step)):
        raise UserError(
            "the run will have no checkpoint of the step in train.register",
            where=f"train.register: {step}",
            got=f"the run has {steps} steps, starts after step {first_step}, and has checkpoints of the steps "
            f"{', '.join(map(str, saved)) or 'none'}",
            fix="choose a later step of the run, or the step of an existing checkpoint",
        )

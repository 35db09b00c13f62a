"""Functions that choose which checkpoint of a run is registered, and which files the model version contains."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pipelines.config import short_hash
from pipelines.config.train import Register
from pipelines.errors import StageFailed, UserError
from pipelines.formats.run_folder import Metrics, Result, RunFolder, read_json, step_of
from pipelines.tracking.logged_model import MODEL_FILES
from vlm.config import GenerationConfig, ModelConfig
from vlm.files import find_damage


def find_checkpoint(run: RunFolder, result: Result, which: Register) -> Path:
    """Return the folder of a checkpoint of a finished run.

    Raises:
        UserError: the run has no checkpoint of the step, the checkpoint contains only an adapter, or it is not known
            which checkpoint is the best.
    """
    if which == "last":
        return run.checkpoints / Path(result.checkpoint).name
    if which == "best":
        return run.checkpoints / Path(_best_checkpoint(run, result)).name
    if run.checkpoint(which) not in run.finished_checkpoints():
        kept = ", ".join(str(step_of(folder)) for folder in run.finished_checkpoints())
        raise UserError(
            "the run has no checkpoint of this step",
            where=str(run.checkpoints),
            got=f"step {which}; the run has checkpoints of the steps {kept}",
            fix="choose one of these steps; train.keep_checkpoints says how many checkpoints a run keeps",
        )
    if run.read_run().config.train.adapter and which != step_of(Path(result.checkpoint)):
        raise UserError(
            "only the last checkpoint of an adapter run contains a whole model",
            where=str(run.checkpoint(which)),
            got=f"step {which}; the last checkpoint has step {step_of(Path(result.checkpoint))}",
            fix="choose the last checkpoint; for a shorter training, train a run with fewer train.steps",
        )
    return run.checkpoint(which)


def require_intact(checkpoint: Path) -> None:
    """Compare the files of a checkpoint with the SHA-256 in its files.json, before the files are registered.

    Raises:
        StageFailed: a file is missing or was changed after the checkpoint was written.
    """
    if problems := find_damage(checkpoint):
        raise StageFailed(
            "a damaged checkpoint is not registered",
            where=str(checkpoint),
            got=problems,
            fix="restore the folder from a backup; or register another checkpoint of the run; or remove the folder and "
            "run `lakesight train` again, which continues from an earlier checkpoint",
        )


def metrics_of(run: RunFolder, checkpoint: Path) -> dict[str, float]:
    """Return the metrics of a checkpoint's step, or an empty dict if the step was neither logged nor validated."""
    path = run.metrics(step_of(checkpoint))
    return read_json(path, Metrics).values if path.exists() else {}


def _best_checkpoint(run: RunFolder, result: Result) -> str:
    if not result.best_checkpoint:
        raise UserError(
            "the best checkpoint of the run is not known",
            where=str(run.result),
            got="Lakesight 0.1.0 wrote the result, which does not name the best checkpoint",
            fix="register the last checkpoint (train.register: last), or train again with another seed",
        )
    return result.best_checkpoint


class FilesToRegister(NamedTuple):
    """Folder of a version's model files, and a hash of the generation settings that replace the checkpoint's settings.

    The hash is empty if the version has the generation settings of its checkpoint.
    """

    folder: Path
    generation: str


@contextmanager
def files_to_register(checkpoint: Path, generation: GenerationConfig | None) -> Iterator[FilesToRegister]:
    """Yield the files of a version, which are the files of its checkpoint.

    If `generation` differs from the generation settings of the checkpoint, yield a copy with a changed config.json.
    """
    file = checkpoint / "config.json"
    config = ModelConfig.model_validate_json(file.read_text(encoding="utf-8")) if file.is_file() else None
    if config is None or generation is None or generation == config.generation:
        yield FilesToRegister(checkpoint, "")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in MODEL_FILES:
            if name != file.name and (checkpoint / name).is_file():
                (folder / name).symlink_to((checkpoint / name).absolute())
        changed = config.model_copy(update={"generation": generation})
        (folder / file.name).write_text(changed.model_dump_json(indent=2), encoding="utf-8")
        yield FilesToRegister(folder, short_hash(generation.hashed_settings()))

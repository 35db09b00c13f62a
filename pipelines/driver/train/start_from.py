"""Validation of `train.start_from`, the folder that contains the initial weights of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipelines.config import TrainConfig, short_hash
from pipelines.config.train import EXECUTION_SETTINGS
from pipelines.driver.train.random_parameters import require_training_of_random_parameters
from pipelines.errors import UserError
from pipelines.formats.model_copy import RECORD, changed_files
from pipelines.formats.run_folder import RunFile, RunFolder, read_json
from vlm import text
from vlm.config import Config, ModelConfig, config_differences, read_error_message
from vlm.files import MANIFEST, TRAINING_STEP, file_digest, find_damage, read_training_step

FILES = ("model.safetensors", "config.json", "tokenizer.json")
STATE_FILES = ("training.safetensors", TRAINING_STEP, "run.json")
FREE_SETTINGS = EXECUTION_SETTINGS | {
    *("steps", "start_from", "start_state", "log_every", "validate_every", "validate_rows", "caption_samples"),
    *("score_every", "best_by", "stop"),
}
"""Training settings that may change when a run continues the training of an earlier run."""


class StartFolder(Config):
    """A folder with the weights, the config and the tokenizer of a model.

    Attributes:
        folder: absolute path of the folder, because ranks may have another working directory.
        weights: SHA-256 of the weights file.
        tokenizer_digest: SHA-256 of the tokenizer file.
    """

    folder: Path
    weights: str
    tokenizer_digest: str

    @property
    def tokenizer(self) -> Path:
        """Path of the tokenizer with which the weights were trained."""
        return self.folder / "tokenizer.json"

    @property
    def digest(self) -> str:
        """Digest of the weights and the tokenizer, on which the outcome of a run depends."""
        return short_hash(self.weights, self.tokenizer_digest)

    def has_tokenizer_of(self, run: RunFolder) -> bool:
        """Return whether a run folder has the tokenizer of this folder. The files may differ in their layout."""
        if not run.tokenizer.exists():
            return False
        if file_digest(run.tokenizer) == self.tokenizer_digest:
            return True
        return text.load(run.tokenizer).to_json() == text.load(self.tokenizer).to_json()


def open_start_folder(folder: Path, config: ModelConfig, settings: TrainConfig) -> StartFolder:
    """Check a folder as `check_start_folder` does, and read the digests of the weights and of the tokenizer."""
    folder = check_start_folder(folder, config, settings)
    weights, _, tokenizer = (file_digest(folder / name) for name in FILES)
    return StartFolder(folder=folder, weights=weights, tokenizer_digest=tokenizer)


def check_start_folder(folder: Path, config: ModelConfig, settings: TrainConfig) -> Path:
    """Check that a folder contains the model that a run trains, possibly with other generation settings.

    A captioner may also start from a text-only model with the same decoder and tokenizer. The encoder and the projector
    of such a captioner begin with random weights.

    Returns:
        The absolute path of the folder.

    Raises:
        UserError: the folder lacks a file of a model, or contains a model that differs from the run's model (the
            message lists each difference). The error is also raised if the folder has only a decoder although the
            settings need trained weights of all parts, or if the run freezes a parameter with random weights.
    """
    folder = folder.absolute()
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            "the folder in train.start_from has no complete model",
            where="train.start_from",
            got=f"{folder} has no {', no '.join(missing)}",
            fix="choose a run's last checkpoint, or a model version's folder below models/ in the home folder",
        )
    try:
        saved = ModelConfig.model_validate_json((folder / "config.json").read_text(encoding="utf-8"))
    except ValidationError as error:
        raise UserError(
            "the model in train.start_from cannot be read",
            where=str(folder / "config.json"),
            got=read_error_message(error, ModelConfig),
            fix="choose a folder that this version of Lakesight has written and nobody has edited",
        ) from None
    decoder_alone = saved.text_only and not config.text_only
    if decoder_alone and (settings.adapter or settings.start_state == "training"):
        raise UserError(
            "the model to start from is a decoder alone, and the encoder would have no trained weights",
            where=f"train.start_from: {folder}",
            got="train.adapter" if settings.adapter else "train.start_state: training",
            fix=f"remove train.{'adapter' if settings.adapter else 'start_state'}, so that all parts are trained",
        )
    compared = {"decoder", "text"} if decoder_alone else None
    saved_model, run_model = (model.model_dump(include=compared, exclude={"generation"}) for model in (saved, config))
    differing = list(config_differences({"model": saved_model}, {"model": run_model}))
    if differing:
        raise UserError(
            "the model in train.start_from differs from the run's model",
            where=f"train.start_from: {folder}",
            got=differing,
            fix="choose a run with the same model config, or change these values of the run with --set",
        )
    require_training_of_random_parameters(folder, settings)
    return folder


def require_intact(folder: Path) -> None:
    """Compare the files of a start folder with the SHA-256 hashes that were recorded when the files were written.

    The record of a run's checkpoint is files.json, and the record of a downloaded model version is copy.json. A folder
    without a record, for example with imported weights, is not checked.

    Raises:
        UserError: a file is missing or has changed, or the record cannot be read.
    """
    problems: list[str] = []
    try:
        if (folder / MANIFEST).exists():
            problems = find_damage(folder)
        elif (folder / RECORD).exists():
            problems = [f"{name} has changed since it was downloaded" for name in changed_files(folder)]
    except (OSError, ValueError) as error:
        problems = [f"{RECORD} cannot be read ({type(error).__name__}: {error})"]
    if problems:
        raise UserError(
            "the model in train.start_from is damaged",
            where=f"train.start_from: {folder}",
            got=problems,
            fix="restore the folder from a backup, remove a folder below models/ so that it is downloaded again, or "
            "choose another checkpoint",
        )


def check_training_state(start: StartFolder, settings: TrainConfig) -> str:
    """Check that a run can continue the training of a checkpoint. Return the SHA-256 of the optimizer state.

    Raises:
        UserError: the folder has no training state, or the earlier training had other settings or has already taken all
            steps.
    """
    missing = [name for name in STATE_FILES if not (start.folder / name).is_file()]
    if missing:
        raise UserError(
            "the folder in train.start_from has no training state to continue from",
            where="train.start_from",
            got=f"{start.folder} has no {', no '.join(missing)}",
            fix="choose a run's checkpoint, or use only the weights of the folder with train.start_state: weights",
        )
    before = read_json(start.folder / "run.json", RunFile).config.train
    saved, now = ({"train": _fixed_settings(train)} for train in (before, settings))
    if differing := list(config_differences(saved, now)):
        raise UserError(
            "the training in train.start_from had other settings than this run",
            where=f"train.start_from: {start.folder}",
            got=differing,
            fix="use the same settings with more train.steps (with stages: more steps of the last stage), or use only "
            "the weights with train.start_state: weights",
        )
    done = read_training_step(start.folder)
    if done >= settings.steps:
        raise UserError(
            "the training in train.start_from has already taken all steps of this run",
            where="train.steps",
            got=f"train.steps is {settings.steps}, and checkpoint {start.folder} has {done} steps",
            fix="set train.steps to the total number of steps of both runs",
        )
    return file_digest(start.folder / STATE_FILES[0])


def _fixed_settings(train: TrainConfig) -> dict[str, Any]:
    """Return the training settings that must stay equal. The last stage may have more steps than before."""
    settings = train.hashed_settings(exclude=FREE_SETTINGS)
    if stages := settings.get("stages"):
        *earlier, last = stages
        settings["stages"] = (*earlier, {key: value for key, value in last.items() if key != "steps"})
    return settings


def require_same_data(start: StartFolder, content_hash: str) -> None:
    """Check that a run which continues the training of a checkpoint trains on the same rows as the earlier training.

    Raises:
        UserError: the training rows, or the settings that decide the order and the texts of the rows, have changed.
    """
    before = read_json(start.folder / "run.json", RunFile).content_hash
    if before != content_hash:
        raise UserError(
            "the training in train.start_from had other training data than this run",
            where=f"train.start_from: {start.folder}",
            got=f"the content hash of the training shards was {before}, and is now {content_hash}",
            fix="continue only on the same rows and data settings, or use only the weights with train.start_state: "
            "weights",
        )

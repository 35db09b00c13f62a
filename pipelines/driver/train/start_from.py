"""Validation of `train.start_from`, the folder that contains the initial weights of a run."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from pipelines.errors import UserError
from vlm.config import Config, ModelConfig, config_differences, read_error_message
from vlm.files import file_digest

FILES = ("model.safetensors", "config.json", "tokenizer.json")


class StartFolder(Config):
    """A folder with the weights, the config and the tokenizer of a model.

    Attributes:
        folder: absolute path of the folder, because ranks may have another working directory.
        digest: SHA-256 of the weights file.
    """

    folder: Path
    digest: str

    @property
    def tokenizer(self) -> Path:
        """Path of the tokenizer with which the weights were trained."""
        return self.folder / "tokenizer.json"


def open_start_folder(folder: Path, config: ModelConfig) -> StartFolder:
    """Check that a folder contains the model that a run trains. The generation settings of the model may differ.

    Raises:
        UserError: the folder lacks a file of a model, or contains another model. The message lists each difference.
    """
    folder = folder.absolute()
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            "there is no model to start from",
            where="train.start_from",
            got=f"{folder} has no {', no '.join(missing)}",
            fix="give a folder with a complete model: a run's last checkpoint, or a version in models/ of the home",
        )
    try:
        saved = ModelConfig.model_validate_json((folder / "config.json").read_text(encoding="utf-8"))
    except ValidationError as error:
        raise UserError(
            "the model to start from cannot be read",
            where=str(folder / "config.json"),
            got=read_error_message(error),
            fix="choose a folder that this version of Lakesight has written and nobody has edited",
        ) from None
    saved_model, run_model = (model.model_dump(exclude={"generation"}) for model in (saved, config))
    differing = list(config_differences({"model": saved_model}, {"model": run_model}))
    if differing:
        raise UserError(
            "the model to start from differs from the run's model",
            where=f"train.start_from: {folder}",
            got="; ".join(differing),
            fix="choose the run config of that model, or change these values of the run with --set",
        )
    return StartFolder(folder=folder, digest=file_digest(folder / FILES[0]))

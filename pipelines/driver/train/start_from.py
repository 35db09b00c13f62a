"""The checkpoint folder that a run starts from: it must hold the very model that the run is to train."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from pipelines.errors import UserError
from vlm.config import Config, ModelConfig, config_differences, read_error_message
from vlm.files import file_digest

FILES = ("model.safetensors", "config.json", "tokenizer.json")


class StartFolder(Config):
    """A folder of weights, config and tokenizer.

    Attributes:
        folder: absolute, for ranks have a working directory of their own.
        digest: SHA-256 of the weights.
    """

    folder: Path
    digest: str

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that the weights were trained with."""
        return self.folder / "tokenizer.json"


def open_start(folder: Path, config: ModelConfig) -> StartFolder:
    """The folder, if its model is the one a run is to train. How either generates may differ.

    Raises:
        UserError: the folder does not hold a whole model, or holds another one; lists what differs.
    """
    folder = folder.absolute()
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            "there is no model to start from",
            where="train.start_from",
            got=f"{folder} has no {', no '.join(missing)}",
            fix="name the folder of a whole model: a run's last checkpoint, or a version in the home folder's models/",
        )
    try:
        own = ModelConfig.model_validate_json((folder / "config.json").read_text(encoding="utf-8"))
    except ValidationError as error:
        raise UserError(
            "the model to start from cannot be read",
            where=str(folder / "config.json"),
            got=read_error_message(error),
            fix="it was written by another version, or by hand",
        ) from None
    there, here = (model.model_dump(exclude={"generation"}) for model in (own, config))
    differing = list(config_differences({"model": there}, {"model": here}))
    if differing:
        raise UserError(
            "the model to start from is another than the run's",
            where=f"train.start_from: {folder}",
            got="; ".join(differing),
            fix="choose the run whose model it is, or --set these values of the run as they are there",
        )
    return StartFolder(folder=folder, digest=file_digest(folder / FILES[0]))

"""Files of a registered model version, as the driver uses them."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from pipelines.errors import UserError
from vlm.config import Config, GenerationConfig, ModelConfig


class ModelFiles(Config):
    """A version of a registered model, and the folder of its files.

    Attributes:
        folder: folder with the weights, config and tokenizer; executors see the folder under the same path.
        name: name of the registered model.
        version: version number of the registered model.
        run_id: id of the MLflow run that trained the version.
        digest: digest of the files (`pipelines.formats.model_copy`), or empty if the files are not a recorded copy.
        remote: whether the folder is on a network drive. Each host copies a folder on a network drive once.
        settings: generation settings of an evaluation, or None for the version's own generation settings at temperature
            0.
    """

    folder: Path
    name: str
    version: str
    run_id: str
    digest: str = ""
    remote: bool = False
    settings: GenerationConfig | None = None

    def read_config(self) -> ModelConfig:
        """Read the model's config.

        Raises:
            UserError: the folder has no valid config.json.
        """
        path = self.folder / "config.json"
        try:
            return ModelConfig.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValidationError) as error:
            raise UserError(
                "the model's config cannot be read",
                where=str(path),
                got=type(error).__name__,
                fix=f"remove {self.folder}: the next command downloads the model from the registry again",
            ) from None

"""Files of a registered model version, as the driver uses them."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from pipelines.errors import UserError
from vlm.config import Config, ModelConfig


class ModelFiles(Config):
    """A model version and the folder of its files.

    Attributes:
        folder: weights, config and tokenizer; visible to executors under the same path.
        name: name of the registered model.
        version: version of the registered model.
        run_id: MLflow run that trained the version.
        remote: whether the folder is on a network; each host then copies it once.
    """

    folder: Path
    name: str
    version: str
    run_id: str
    remote: bool = False

    def read_config(self) -> ModelConfig:
        """Read the model's config.

        Raises:
            UserError: the folder does not hold a model.
        """
        path = self.folder / "config.json"
        try:
            return ModelConfig.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValidationError) as error:
            raise UserError(
                "the model's config cannot be read",
                where=str(path),
                got=type(error).__name__,
                fix=f"remove {self.folder}: the next command downloads it from the registry again",
            ) from None

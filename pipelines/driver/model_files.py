"""A registered model version whose weights are on disk: what the driver needs to know of the registry."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from pipelines.errors import UserError
from vlm.config import Config, ModelConfig


class ModelFiles(Config):
    """A version by name, and the folder (visible to executors) of its weights, config and tokenizer.

    `remote` says that the folder is on a network: each machine copies it once.
    """

    folder: Path
    name: str
    version: str
    run_id: str
    remote: bool = False

    def read_config(self) -> ModelConfig:
        """The model's config.

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
                fix=f"remove {self.folder}: the next command fetches it from the registry again",
            ) from None

"""The registered model: an MLflow `PythonModel` that captions pictures with the weights of one checkpoint.

MLflow executes this file to load the model ("models from code"), so nothing is pickled. The input is a DataFrame with
the column `image` and an optional column `prompt`. REST clients send each picture as base64 text, with or without a
`data:` prefix. Python callers may also pass bytes, because MLflow does not convert object columns. The output is a
DataFrame with the columns `caption` and `error`, and exactly one of these columns is null in each row. A bad picture or
prompt therefore affects no other row. A value of a wrong type, such as a list, causes an error in its own row and in no
other row. The input of a text-only model has only the column `prompt`, and the model continues the texts in this
column.
"""

from __future__ import annotations

from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from pipelines.executor.ingest.values import is_missing
from vlm.errors import ConfigError, UserError


class CaptionModel(PythonModel):
    """Model that captions DataFrames of pictures. The MLflow artifacts of the model are the files of a checkpoint."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights. torch is imported in this method, so that this file can be imported without torch."""
        from pipelines.worker.caption import load_captioner

        self._captioner = load_captioner(str(Path(context.artifacts["model.safetensors"]).parent))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Caption the pictures in column `image`. Return the columns `caption` and `error`, with the input's index.

        `params` are generation settings. MLflow passes all settings, and uses the model's own value for each setting
        that the caller has not given (`logged_model.signature`).
        """
        if self._captioner.model.config.text_only:
            return self._continue(model_input, params or {})
        images = [_picture(cell) for cell in model_input["image"]]
        prompts = [_prompt_text(prompt) for prompt in model_input.get("prompt", [""] * len(images))]
        try:
            results = self._captioner.caption(images, prompts, **params or {})
        except ConfigError as error:  # a model server returns this message with status 400
            raise MlflowException.invalid_parameter_value(str(error)) from None
        return pd.DataFrame(
            {"caption": [r.caption for r in results], "error": [r.error for r in results]},
            index=model_input.index,
            dtype=object,
        )

    def _continue(self, model_input: pd.DataFrame, params: dict[str, Any]) -> pd.DataFrame:
        """Continue the texts in column `prompt`, if the model is a text-only model."""
        rows: list[tuple[str | None, str | None]] = []
        for prompt in map(_prompt_text, model_input["prompt"]):
            try:
                if not isinstance(prompt, str):
                    raise UserError("the prompt is not a text", got=f"a {type(prompt).__name__}", fix="give a string")
                rows.append(("".join(self._captioner.stream([], prompt, **params)), None))
            except ConfigError as error:
                raise MlflowException.invalid_parameter_value(str(error)) from None
            except UserError as error:
                rows.append((None, str(error)))
        return pd.DataFrame(rows, columns=["caption", "error"], index=model_input.index, dtype=object)


def _picture(cell: Any) -> Any:
    """Return the picture in a cell, or None if the cell is empty. The captioner refuses a value of a wrong type."""
    if is_missing(cell):
        return None
    return bytes(cell) if isinstance(cell, bytearray | memoryview) else cell


def _prompt_text(cell: Any) -> Any:
    """Return a cell's prompt, or an empty string for an empty cell. The captioner refuses a value of a wrong type."""
    if is_missing(cell):
        return ""
    if isinstance(cell, bytes):
        return cell.decode(errors="surrogateescape")  # bad UTF-8 becomes surrogates, which the captioner refuses
    return str(cell) if isinstance(cell, Number | np.generic) else cell


set_model(CaptionModel())

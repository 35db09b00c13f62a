"""The registered model: an MLflow `PythonModel` that captions pictures with the weights of one checkpoint.

MLflow executes this file to load the model ("models from code"), so nothing is pickled. The input is a DataFrame with
the column `image` and an optional column `prompt`. REST clients send each picture as base64 text, with or without a
`data:` prefix. Python callers may also pass bytes, because MLflow does not convert object columns. The output is a
DataFrame with the columns `caption` and `error`. In each row one of the two columns is null, so a bad picture or prompt
affects no other row. A value that is neither a picture nor a prompt, such as a list, is an error of its row.
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
from vlm.errors import ConfigError


class CaptionModel(PythonModel):
    """Model that captions DataFrames of pictures. Its MLflow artifacts are the files of one checkpoint folder."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights. Torch is imported here, so that importing this file does not need torch."""
        from pipelines.worker.caption import load_captioner

        self._captioner = load_captioner(str(Path(context.artifacts["model.safetensors"]).parent))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Caption the pictures in column `image`. Return columns `caption` and `error` with the index of the input.

        `params` are generation settings. MLflow gives every setting, with the model's own value where the caller gave
        none (`logged_model.signature`).
        """
        images = [_picture(cell) for cell in model_input["image"]]
        prompts = [_prompt_text(prompt) for prompt in model_input.get("prompt", [""] * len(images))]
        try:
            results = self._captioner.caption(images, prompts, **params or {})
        except ConfigError as error:  # a server answers with this message and status 400
            raise MlflowException.invalid_parameter_value(str(error)) from None
        return pd.DataFrame(
            {"caption": [r.caption for r in results], "error": [r.error for r in results]},
            index=model_input.index,
            dtype=object,
        )


def _picture(cell: Any) -> Any:
    """Return the picture of a cell, or None if the cell has no value. The captioner refuses all but bytes and text."""
    if is_missing(cell):
        return None
    return bytes(cell) if isinstance(cell, bytearray | memoryview) else cell


def _prompt_text(cell: Any) -> Any:
    """Return the prompt of a cell, or an empty string if the cell has no value. The captioner refuses all but texts."""
    if is_missing(cell):
        return ""
    if isinstance(cell, bytes):
        return cell.decode(errors="surrogateescape")  # the captioner refuses a text with surrogates
    return str(cell) if isinstance(cell, Number | np.generic) else cell


set_model(CaptionModel())

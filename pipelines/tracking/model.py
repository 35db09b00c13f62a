"""The captioner as MLflow serves it: this file is the model's code, the weights are safetensors beside it.

MLflow runs this file when the model is loaded ("models from code"), so nothing is pickled. Input: column `image` and
optionally column `prompt`. The schema calls `image` a string, which REST needs: base64, and a `data:` prefix may stand
before it. In Python the same column also takes bytes, because MLflow passes object columns through as they are.
Output: one row a picture with `caption` and `error`, one of them null: a bad picture never fails its neighbours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class CaptionModel(PythonModel):
    """Captions DataFrames of pictures; the artifacts are the files of one checkpoint folder."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights (needs torch, which importing this file does not)."""
        from pipelines.worker.caption import load_captioner

        self._captioner = load_captioner(str(Path(context.artifacts["model.safetensors"]).parent))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Columns image and optionally prompt in; columns caption and error out, row by row."""
        images = [_value(image) for image in model_input["image"]]
        prompts = [str(_value(prompt) or "") for prompt in model_input.get("prompt", [""] * len(images))]
        results = self._captioner.caption(images, prompts, self._captioner.model.config.generation)
        return pd.DataFrame(
            {"caption": [r.caption for r in results], "error": [r.error for r in results]},
            index=model_input.index,
            dtype=object,
        )


def _value(cell: Any) -> Any:
    """None where pandas says NaN, NA or None."""
    return None if pd.api.types.is_scalar(cell) and pd.isna(cell) else cell


set_model(CaptionModel())

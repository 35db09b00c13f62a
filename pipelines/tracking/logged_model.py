"""Functions that log the model of a checkpoint to MLflow, with files, code, requirements and signature."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from PIL import Image

import pipelines
import vlm
from pipelines.errors import UserError
from vlm.config import GenerationConfig, ModelConfig

ARTIFACTS = "artifacts"
"""Folder of the model files in a logged model."""
MODEL_FILES = ("model.safetensors", "config.json", "tokenizer.json")
REQUIREMENTS = (
    *("mlflow", "numpy", "pandas", "pillow", "pyarrow", "pydantic", "pyyaml", "regex", "safetensors", "tokenizers"),
    "torch",
)

PARAMETERS = {
    **dict.fromkeys(("max_new_tokens", "top_k", "num_beams", "seed"), "long"),
    **dict.fromkeys(("temperature", "top_p", "min_p", "length_penalty", "repetition_penalty"), "double"),
    "stop": "string",
}
"""MLflow's type of each generation setting; for the setting `stop`, which is a list, the type of the elements."""


def signature(settings: GenerationConfig, *, text_only: bool = False) -> ModelSignature:
    """Return the MLflow signature of a model: its input columns, its output columns, and its generation settings.

    A text-only model has no column of pictures, and continues its prompts.

    A caller may change the generation settings for one request with `params`. By default, the model's own generation
    settings are used.
    """
    defaults = settings.model_dump(mode="json")
    params = [
        ParamSpec(name, kind, defaults[name], shape=(-1,) if name == "stop" else None)
        for name, kind in PARAMETERS.items()
    ]
    return ModelSignature(
        inputs=Schema(
            [ColSpec("string", "prompt")]
            if text_only
            else [ColSpec("string", "image"), ColSpec("string", "prompt", required=False)]
        ),
        outputs=Schema([ColSpec("string", "caption", required=False), ColSpec("string", "error", required=False)]),
        params=ParamSchema(params),
    )


def log_model(client: MlflowClient, checkpoint: Path, run_id: str) -> str:
    """Log the model of a checkpoint to an MLflow run, and return the id of the logged model.

    Raises:
        UserError: the checkpoint lacks a model file.
    """
    missing = [file for file in MODEL_FILES if not (checkpoint / file).is_file()]
    if missing:
        raise UserError(
            "the run's checkpoint is incomplete",
            where=str(checkpoint),
            got=f"missing {', '.join(missing)}",
            fix="train again: the run resumes from its last complete checkpoint",
        )
    config = ModelConfig.model_validate_json((checkpoint / "config.json").read_text(encoding="utf-8"))
    experiment_id = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(experiment_id, name="model", source_run_id=run_id)
    with _without_bytecode():
        Model.log(
            artifact_path=None,
            flavor=mlflow.pyfunc,
            run_id=run_id,
            model_id=logged.model_id,
            python_model=str(Path(__file__).with_name("model.py")),
            artifacts={file: (checkpoint / file).resolve().as_uri() for file in MODEL_FILES},
            code_paths=[package.__path__[0] for package in (vlm, pipelines)],
            signature=signature(config.generation, text_only=config.text_only),
            input_example=pd.DataFrame({"prompt": ["A"]}) if config.text_only else _example(),
            pip_requirements=[f"{name}=={_public_version(name)}" for name in REQUIREMENTS],
        )
    return str(logged.model_id)


def read_config(folder: Path) -> ModelConfig:
    """Read the model config of a logged model in a local folder."""
    return ModelConfig.model_validate_json((folder / ARTIFACTS / "config.json").read_text(encoding="utf-8"))


def set_generation_defaults(folder: Path, settings: GenerationConfig, *, where: str) -> None:
    """Change the generation settings that a logged model in a local folder uses for requests without `params`.

    Raises:
        UserError: the model was logged by a release whose models accept no generation settings. `where` names the
            model in the error.
    """
    model = Model.load(folder)
    if model.signature is None or model.signature.params is None:
        raise UserError(
            "this model version accepts no generation settings",
            where=where,
            got="a version that was registered by an earlier release of Lakesight",
            fix="register the version again: run `lakesight train` with the settings",
        )
    model.signature = signature(settings, text_only=read_config(folder).text_only)
    model.save(str(folder / "MLmodel"))


@contextmanager
def _without_bytecode() -> Iterator[None]:
    """Prevent Python from writing bytecode files into the model's folder while MLflow tests the model there."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _example() -> pd.DataFrame:
    """Return an example of the model's input: one grey picture in base64, the form in which REST clients send
    pictures."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "grey").save(buffer, "PNG")
    return pd.DataFrame({"image": [base64.b64encode(buffer.getvalue()).decode("ascii")]})


def _public_version(package: str) -> str:
    """Return the installed version without the build label, because package indexes have 2.13.0 but not 2.13.0+cpu.

    The version of MLflow is read from the module, because ML runtimes of Databricks contain the distribution
    `mlflow-skinny`.
    """
    found = mlflow.__version__ if package == "mlflow" else importlib.metadata.version(package)
    return found.partition("+")[0]

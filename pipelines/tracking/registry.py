"""The model registry: versions made from run folders, aliases that say which one serves, weights on disk.

A version is self-contained: safetensors, the model's config and tokenizer, the code that runs them, requirements with
exact versions. `champion` is the alias that captioning uses, `previous` the one it had before, `challenger` the last
one that asked to be promoted.

A registry has no transactions, so an alias that moves is announced first, in a tag of the model, and the tag goes when
both aliases are where they belong. Whoever comes next reads the tag and ends a move that was interrupted. `champion`
moves first: until then nothing has happened, from then on the move is as good as done.
"""

from __future__ import annotations

import base64
import importlib.metadata
import io
import logging
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion as MlflowVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, Schema
from PIL import Image

import pipelines
import vlm
from pipelines.errors import StageFailed, UserError
from pipelines.formats.run_folder import Result, RunFolder, read_json
from pipelines.platform import Platform, redact_uri
from pipelines.tracking.runs import connect
from vlm.config import Config

logger = logging.getLogger(__name__)

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
MOVE_TAG = "lakesight_move"
MODEL_FILES = ("model.safetensors", "config.json", "tokenizer.json")
TAG_PREFIX = "lakesight_"
MAX_TAG_CHARS = 1000
REQUIREMENTS = ("mlflow", "numpy", "pandas", "pillow", "pydantic", "pyyaml", "safetensors", "tokenizers", "torch")

SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string", "image"), ColSpec("string", "prompt", required=False)]),
    outputs=Schema([ColSpec("string", "caption", required=False), ColSpec("string", "error", required=False)]),
)


class ModelVersion(Config):
    """A version of a registered model; tags without their `lakesight_` prefix."""

    name: str
    version: str
    run_id: str
    tags: dict[str, str]
    aliases: tuple[str, ...]


class Move(Config):
    """An alias move that was begun: which versions `champion` and `previous` shall be."""

    kind: Literal["promote", "rollback"]
    champion: str
    previous: str | None


def register(run: RunFolder, run_id: str, platform: Platform) -> ModelVersion:
    """The registered version of a finished run: made now, or the one that this run already has.

    Raises:
        UserError: the run is not finished, or its checkpoint is gone.
        StageFailed: the registry refuses.
    """
    client = connect(platform)
    file, result = run.read_run(), read_json(run.result, Result)
    name = platform.model_name(file.config.name)
    with _registry_errors(platform, f"model {name}"):
        _create_model(client, name)
        for version in _versions(client, name):
            if version.run_id == run_id:
                return _details(client, name, version.version)
        model_id = _log_model(client, run.path / "checkpoints" / Path(result.checkpoint).name, run_id)
        tags = {
            "run": run.path.name,
            "table_version": str(file.dataset_version),
            "manifest_hash": file.content_hash,
            "code_version": file.code_version,
        } | {f"training_{key}": f"{value:.6g}" for key, value in result.metrics.items()}
        created = client.create_model_version(
            name, f"models:/{model_id}", run_id=run_id, tags=_prefixed(tags), model_id=model_id
        )
    return _details(client, name, created.version)


def resolve(platform: Platform, name: str, which: str) -> ModelVersion:
    """The version of model `name` (as registered) that a number, an alias, or `latest` means.

    Raises:
        UserError: no such model, version or alias; lists what there is.
    """
    client = connect(platform)
    with _registry_errors(platform, f"model {name}"):
        aliases = _find_model(platform, client, name)
        numbers = [str(version.version) for version in _versions(client, name)]
        number = numbers[-1] if which == "latest" and numbers else aliases.get(which, which)
        if number not in numbers:
            listed = ", ".join(f"{alias} (= {version})" for alias, version in sorted(aliases.items())) or "none"
            raise UserError(
                f"model {name} has no version or alias {which!r}",
                where=redact_uri(platform.registry_uri),
                got=which,
                fix=f"versions: {', '.join(numbers) or 'none'}; aliases: {listed}",
            )
        return _details(client, name, number)


def download(platform: Platform, version: ModelVersion) -> Path:
    """The folder of a version's weights, config and tokenizer; fetched once, then found again.

    Raises:
        StageFailed: the registry does not deliver them.
    """
    target = platform.folder("models") / version.name / version.version
    if target.is_dir():
        return target
    partial = target.with_name(f".{version.version}.{uuid.uuid4().hex}.tmp")
    try:
        with tempfile.TemporaryDirectory() as local:
            model = fetch(platform, version, Path(local))
            partial.mkdir(parents=True)
            for file in MODEL_FILES:
                shutil.copyfile(model / "artifacts" / file, partial / file)
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster: its copy is as good as ours
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def fetch(platform: Platform, version: ModelVersion, folder: Path) -> Path:
    """All files of a version, copied into a folder; returns where its MLmodel lies.

    Raises:
        StageFailed: the registry does not deliver them.
    """
    connect(platform)
    with _registry_errors(platform, _label(version)):
        uri = f"models:/{version.name}/{version.version}"
        return Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder)))


def tag(platform: Platform, version: ModelVersion, tags: Mapping[str, str]) -> ModelVersion:
    """Add tags to a version; returns it anew."""
    client = connect(platform)
    with _registry_errors(platform, _label(version)):
        for key, value in _prefixed(tags).items():
            client.set_model_version_tag(version.name, version.version, key, value)
        return _details(client, version.name, version.version)


def set_alias(platform: Platform, version: ModelVersion, alias: str) -> ModelVersion:
    """Let `alias` mean this version, and no other of its model; returns it anew."""
    client = connect(platform)
    with _registry_errors(platform, _label(version)):
        client.set_registered_model_alias(version.name, alias, version.version)
        return _details(client, version.name, version.version)


def champion_of(platform: Platform, name: str) -> ModelVersion | None:
    """The version that serves, if one does; a move that was interrupted is ended first."""
    client = connect(platform)
    with _registry_errors(platform, f"model {name}"):
        _settle(client, platform, name)
        number = _find_model(platform, client, name).get(CHAMPION)
        return None if number is None else _details(client, name, number)


def promote(platform: Platform, version: ModelVersion) -> ModelVersion:
    """Make a version the champion; the former champion becomes `previous`. Promoting the champion changes nothing.

    The caller has asked the gate (`driver.promote.judge`) first.
    """
    client = connect(platform)
    with _registry_errors(platform, _label(version)):
        _settle(client, platform, version.name)
        former = _find_model(platform, client, version.name).get(CHAMPION)
        if former != version.version:
            _move(client, version.name, Move(kind="promote", champion=version.version, previous=former))
        return _details(client, version.name, version.version)


def plan_rollback(platform: Platform, name: str) -> Move | None:
    """The move that swaps champion and previous; None where a rollback was interrupted, which is ended now instead.

    Raises:
        UserError: there is no previous champion.
    """
    client = connect(platform)
    with _registry_errors(platform, f"model {name}"):
        ended = _settle(client, platform, name)
        if ended is not None and ended.kind == "rollback":
            return None
        aliases = _find_model(platform, client, name)
    if not {CHAMPION, PREVIOUS} <= aliases.keys():
        raise UserError(
            f"model {name} has no former champion to go back to",
            where=redact_uri(platform.registry_uri),
            got=", ".join(f"{alias} = {version}" for alias, version in sorted(aliases.items())) or "no aliases",
            fix="promote a second version first",
        )
    return Move(kind="rollback", champion=aliases[PREVIOUS], previous=aliases[CHAMPION])


def make_move(platform: Platform, name: str, move: Move) -> None:
    """Move both aliases."""
    client = connect(platform)
    with _registry_errors(platform, f"model {name}"):
        _move(client, name, move)


def _move(client: MlflowClient, name: str, move: Move) -> None:
    """Announce a move, and make it."""
    client.set_registered_model_tag(name, MOVE_TAG, move.model_dump_json())
    client.set_registered_model_alias(name, CHAMPION, move.champion)
    _end(client, name, move)


def _end(client: MlflowClient, name: str, move: Move) -> None:
    """What is left to do once `champion` has moved; doing it twice changes nothing."""
    if move.previous is not None:
        client.set_registered_model_alias(name, PREVIOUS, move.previous)
    if str(client.get_registered_model(name).aliases.get(CHALLENGER)) == move.champion:
        client.delete_registered_model_alias(name, CHALLENGER)
    client.delete_registered_model_tag(name, MOVE_TAG)


def _settle(client: MlflowClient, platform: Platform, name: str) -> Move | None:
    """End the move that an interrupted process announced, if `champion` has moved; returns what was ended."""
    aliases = _find_model(platform, client, name)
    announced = client.get_registered_model(name).tags.get(MOVE_TAG)
    if announced is None:
        return None
    move = Move.model_validate_json(announced)
    if aliases.get(CHAMPION) != move.champion:
        client.delete_registered_model_tag(name, MOVE_TAG)
        return None
    logger.info("ending a %s of model %s that was interrupted", move.kind, name)
    _end(client, name, move)
    return move


def _find_model(platform: Platform, client: MlflowClient, name: str) -> dict[str, str]:
    """Aliases of a registered model, each with its version."""
    try:
        return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    models = sorted(model.name for model in client.search_registered_models())
    raise UserError(
        "there is no such registered model",
        where=redact_uri(platform.registry_uri),
        got=name,
        fix=f"registered are: {', '.join(models)}" if models else "train one first: `lakesight pipeline`",
    )


def _label(version: ModelVersion) -> str:
    return f"model {version.name} version {version.version}"


def _create_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _versions(client: MlflowClient, name: str) -> list[MlflowVersion]:
    """All versions, oldest first, without aliases (Unity Catalog's search does not return them)."""
    found: list[MlflowVersion] = []
    token: str | None = None
    while token != "":
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        found += page
        token = page.token or ""
    return sorted(found, key=lambda version: int(version.version))


def _details(client: MlflowClient, name: str, number: str) -> ModelVersion:
    found = client.get_model_version(name, number)
    return ModelVersion(
        name=name,
        version=str(found.version),
        run_id=found.run_id or "",
        tags={k.removeprefix(TAG_PREFIX): v for k, v in found.tags.items() if k.startswith(TAG_PREFIX)},
        aliases=tuple(sorted(found.aliases)),
    )


def _log_model(client: MlflowClient, checkpoint: Path, run_id: str) -> str:
    """Log the model of a checkpoint under the run; returns the id of the logged model."""
    missing = [file for file in MODEL_FILES if not (checkpoint / file).is_file()]
    if missing:
        raise UserError(
            "the run's final checkpoint is not complete",
            where=str(checkpoint),
            got=f"missing {', '.join(missing)}",
            fix="train again: the run goes on from its last complete checkpoint",
        )
    experiment_id = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(experiment_id, name="model", source_run_id=run_id)
    with _without_bytecode():
        Model.log(
            artifact_path=None,
            flavor=mlflow.pyfunc,
            run_id=run_id,
            model_id=logged.model_id,
            python_model=str(Path(__file__).with_name("model.py")),
            artifacts={file: str(checkpoint / file) for file in MODEL_FILES},
            code_paths=[package.__path__[0] for package in (vlm, pipelines)],
            signature=SIGNATURE,
            input_example=_example(),
            pip_requirements=[f"{name}=={_public_version(name)}" for name in REQUIREMENTS],
        )
    return str(logged.model_id)


@contextmanager
def _without_bytecode() -> Iterator[None]:
    """MLflow tries the model from the folder that it logs: Python would leave bytecode of its own version there."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _example() -> pd.DataFrame:
    """A grey picture, as REST takes it."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "grey").save(buffer, "PNG")
    return pd.DataFrame({"image": [base64.b64encode(buffer.getvalue()).decode("ascii")]})


def _public_version(package: str) -> str:
    """The installed version without its build label: an index serves torch 2.13.0, not 2.13.0+cpu."""
    return importlib.metadata.version(package).partition("+")[0]


def _prefixed(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags as Unity Catalog takes them: no `. , - = / :` in a key, at most 1,000 characters in a value."""
    return {f"{TAG_PREFIX}{re.sub('[.,=/: -]', '_', key)}": text[:MAX_TAG_CHARS].strip() for key, text in tags.items()}


@contextmanager
def _registry_errors(platform: Platform, what: str) -> Iterator[None]:
    """MLflow's errors in our form."""
    try:
        yield
    except MlflowException as error:
        raise StageFailed(
            "the model registry refused",
            where=f"{what} in {redact_uri(platform.registry_uri)}",
            got=str(error).splitlines()[0],
            fix="check the name, your rights, and that the server is the one you mean",
        ) from error

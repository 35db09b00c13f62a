"""Functions that register the model of a run folder in MLflow's model registry, look up versions, and move aliases.

A version contains weights, config, tokenizer, the code of the model, and pip requirements with exact version numbers.
The alias `champion` points to the version that generates captions. The alias `previous` points to the champion before
the present champion. The alias `challenger` points to the version that was last submitted for promotion.

A promotion moves two aliases, but a registry cannot move both aliases in one transaction. A tag of the registered model
therefore records the move before the move starts, and the tag is deleted when both aliases are set. A process that
finds the tag of an interrupted move completes the move if `champion` has moved already. If `champion` has not moved
yet, the process cancels the move.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion as MlflowVersion
from mlflow.exceptions import MlflowException

from pipelines.config.train import Register
from pipelines.errors import StageFailed, UserError
from pipelines.formats.run_folder import Result, RunFolder, read_json, step_of
from pipelines.platform import Platform
from pipelines.tracking.checkpoints import files_to_register, find_checkpoint, metrics_of, require_intact
from pipelines.tracking.describe.notes import MODEL_DESCRIPTION, put_sections, version_link
from pipelines.tracking.describe.training import add_sections, version_text
from pipelines.tracking.home_store.copied_version import TAG_PREFIX, choose_number
from pipelines.tracking.logged_model import ARTIFACTS, MODEL_FILES, log_model
from pipelines.tracking.server import REQUEST_ERRORS, connect, registry_failure, unusable
from pipelines.tracking.version_files import digest_tags
from vlm.config import Config, GenerationConfig
from vlm.errors.printable import hide_secrets

logger = logging.getLogger(__name__)

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
MOVE_TAG = "lakesight_move"
CHECKPOINT_TAG = "checkpoint"
"""Name of the tag in which a model version stores the name of its checkpoint. A version without this tag contains the
last checkpoint."""
GENERATION_TAG = "generation"
"""Name of the tag in which a model version stores a hash of its generation settings, if these differ from the settings
of its checkpoint."""
MAX_TAG_CHARS = 1000


class ModelVersion(Config):
    """Version of a registered model.

    The keys of `tags` do not have the prefix `lakesight_` that they have in the registry.

    `created_ms` is the time at which the registry created the version, in milliseconds since the epoch.
    """

    name: str
    version: str
    run_id: str
    created_ms: int
    tags: dict[str, str]
    aliases: tuple[str, ...]


class AliasMove(Config):
    """Target versions of the aliases `champion` and `previous`, stored as JSON in a tag while the aliases move."""

    kind: Literal["promote", "rollback"]
    champion: str
    previous: str | None


def register(
    run: RunFolder,
    run_id: str,
    platform: Platform,
    which: Register = "last",
    generation: GenerationConfig | None = None,
) -> ModelVersion:
    """Register a checkpoint of a finished run, or return the version that was registered for this checkpoint before.

    Args:
        run: run folder.
        run_id: id of the MLflow run.
        platform: platform whose model registry is used.
        which: checkpoint to register (`last`, `best`, or the step of the checkpoint).
        generation: generation settings of the version, or None for the generation settings of the checkpoint.

    Raises:
        UserError: the run is not finished, or the checkpoint is missing or incomplete.
        StageFailed: the registry rejects the request, or a file of the checkpoint was changed after it was written.
    """
    client = connect(platform)
    file, result = run.read_run(), read_json(run.result, Result)
    name = platform.model_name(file.config.name)
    checkpoint = find_checkpoint(run, result, which)
    with _registry_errors(platform, f"model {name}"), files_to_register(checkpoint, generation) as files:
        _create_model(client, name)
        for version in list_versions(client, name):
            registered = version.tags.get(f"{TAG_PREFIX}{CHECKPOINT_TAG}", Path(result.checkpoint).name)
            settings = version.tags.get(f"{TAG_PREFIX}{GENERATION_TAG}", "")
            if (version.run_id, registered, settings) == (run_id, checkpoint.name, files.generation):
                return _read_version(client, name, version.version)
        require_intact(checkpoint)
        model_id = log_model(client, files.folder, run_id)
        is_last = checkpoint.name == Path(result.checkpoint).name
        metrics = result.metrics if is_last else metrics_of(run, checkpoint)
        tags = {
            **digest_tags(files.folder, model_id),
            **({GENERATION_TAG: files.generation} if files.generation else {}),
            CHECKPOINT_TAG: checkpoint.name,
            "run": run.path.name,
            "table_version": str(file.dataset_version),
            "manifest_hash": file.content_hash,
            **file.code_tags(),
        } | {f"training_{key}": f"{value:.6g}" for key, value in metrics.items()}
        created = client.create_model_version(
            name,
            f"models:/{model_id}",
            run_id=run_id,
            tags=_prefixed(tags),
            description=version_text(client, platform, run_id, step_of(checkpoint)),
            model_id=model_id,
        )
        links = {f"Version {created.version}": version_link(platform, name, str(created.version))}
        add_sections(client, run_id, links)
    return _read_version(client, name, created.version)


def describe_version(platform: Platform, version: ModelVersion, sections: Mapping[str, str]) -> None:
    """Replace or append sections in the description of a version."""
    client = connect(platform)
    with _registry_errors(platform, _label(version)):
        present = client.get_model_version(version.name, version.version).description or ""
        client.update_model_version(version.name, version.version, put_sections(present, sections))


def ensure_model(platform: Platform, name: str) -> None:
    """Find or create a registered model.

    Raises:
        UserError: the registry refuses the request.
        TrackingDown: the server does not answer.
    """
    try:
        _create_model(connect(platform), name)
    except REQUEST_ERRORS as error:
        raise unusable(platform, error) from None


def resolve(platform: Platform, name: str, which: str) -> ModelVersion:
    """Look up a version of a registered model by number, alias or `latest`.

    Args:
        platform: platform whose model registry is used.
        name: full name of the registered model.
        which: version to look up (a version number, an alias, or `latest`).

    Raises:
        UserError: the model, version or alias does not exist. The error lists the existing versions and aliases.
    """
    client = connect(platform)
    with _registry_errors(platform, f"model {name}"):
        aliases = _read_aliases(platform, client, name)
        numbers = [str(version.version) for version in list_versions(client, name)]
        number = choose_number(which, numbers, aliases)
        if number is None:
            listed = ", ".join(f"{alias} (= {version})" for alias, version in sorted(aliases.items())) or "none"
            raise UserError(
                f"model {name} has no version or alias {which!r}",
                where=hide_secrets(platform.registry_uri),
                got=f"versions: {', '.join(numbers) or 'none'}; aliases: {listed}",
                fix="choose one of these" + ("; or run `lakesight promote` first" if which == CHAMPION else ""),
            )
        return _read_version(client, name, number)


def label(platform: Platform, version: ModelVersion) -> str:
    """Return a text that names a version and its registry, for error messages."""
    return f"{_label(version)} in {hide_secrets(platform.registry_uri)}"


def download_files(platform: Platform, version: ModelVersion, folder: Path) -> Path:
    """Download all files of a version into a folder, and return the subfolder that contains `MLmodel`.

    Raises:
        StageFailed: the files cannot be downloaded from the registry, the registry names no valid URI for the files, or
            the files are not a model that Lakesight registered.
    """
    client = connect(platform)
    with _registry_errors(platform, _label(version)):
        uri = f"models:/{version.name}/{version.version}"
        try:
            downloaded = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder)))
        except ValueError as error:
            source = client.get_model_version_download_uri(version.name, version.version)
            raise StageFailed(
                "the registry does not name a valid URI for the files of a model version",
                where=label(platform, version),
                got=f"{source}: {error}",
                fix="ask whoever may write to the registry, or train again to register a new version",
            ) from None
    if missing := [file for file in MODEL_FILES if not (downloaded / ARTIFACTS / file).is_file()]:
        raise StageFailed(
            "a model version lacks files that every model of Lakesight has",
            where=label(platform, version),
            got=f"no {' and no '.join(f'{ARTIFACTS}/{file}' for file in missing)}",
            fix="choose a version that `lakesight train` registered",
        )
    return downloaded


def tag(platform: Platform, version: ModelVersion, tags: Mapping[str, str]) -> ModelVersion:
    """Add tags to a version and return the updated version."""
    client = connect(platform)
    with _registry_errors(platform, _label(version)):
        for key, value in _prefixed(tags).items():
            client.set_model_version_tag(version.name, version.version, key, value)
        return _read_version(client, version.name, version.version)


def set_alias(platform: Platform, version: ModelVersion, alias: str) -> ModelVersion:
    """Point an alias to a version and return the updated version."""
    client = connect(platform)
    with _registry_errors(platform, _label(version)):
        client.set_registered_model_alias(version.name, alias, version.version)
        return _read_version(client, version.name, version.version)


def find_champion(platform: Platform, name: str) -> ModelVersion | None:
    """Complete an interrupted alias move, then return the champion, or None if there is no champion."""
    client = connect(platform)
    with _registry_errors(platform, f"model {name}"):
        _finish_interrupted_move(client, platform, name)
        number = _read_aliases(platform, client, name).get(CHAMPION)
        return None if number is None else _read_version(client, name, number)


def promote(platform: Platform, version: ModelVersion) -> ModelVersion:
    """Point `champion` to a version and `previous` to the old champion.

    If the version is already the champion, nothing changes. The caller must check the conditions of promotion before
    this call (`jobs.promote.check_gate`).
    """
    client = connect(platform)
    with _registry_errors(platform, _label(version)):
        _finish_interrupted_move(client, platform, version.name)
        old_champion = _read_aliases(platform, client, version.name).get(CHAMPION)
        if old_champion != version.version:
            _move(client, version.name, AliasMove(kind="promote", champion=version.version, previous=old_champion))
        return _read_version(client, version.name, version.version)


def plan_rollback(platform: Platform, name: str) -> AliasMove | None:
    """Return the move that swaps `champion` and `previous`.

    If an interrupted rollback has just been completed, return None, because another swap would undo the rollback.

    Raises:
        UserError: the model has no previous champion.
    """
    client = connect(platform)
    with _registry_errors(platform, f"model {name}"):
        completed = _finish_interrupted_move(client, platform, name)
        if completed is not None and completed.kind == "rollback":
            return None
        aliases = _read_aliases(platform, client, name)
    if not {CHAMPION, PREVIOUS} <= aliases.keys():
        raise UserError(
            f"model {name} has no previous champion to roll back to",
            where=hide_secrets(platform.registry_uri),
            got=", ".join(f"{alias} = {version}" for alias, version in sorted(aliases.items())) or "no aliases",
            fix="promote a second version of the model before you roll back",
        )
    return AliasMove(kind="rollback", champion=aliases[PREVIOUS], previous=aliases[CHAMPION])


def move_aliases(platform: Platform, name: str, move: AliasMove) -> None:
    """Move the aliases `champion` and `previous` as `plan_rollback` has planned."""
    client = connect(platform)
    with _registry_errors(platform, f"model {name}"):
        _move(client, name, move)


def _move(client: MlflowClient, name: str, move: AliasMove) -> None:
    """Record a move in a tag, then move the aliases and delete the tag."""
    client.set_registered_model_tag(name, MOVE_TAG, move.model_dump_json())
    client.set_registered_model_alias(name, CHAMPION, move.champion)
    _finish_move(client, name, move)


def _finish_move(client: MlflowClient, name: str, move: AliasMove) -> None:
    """Complete a move whose alias `champion` has moved already. This function is idempotent."""
    if move.previous is not None:
        client.set_registered_model_alias(name, PREVIOUS, move.previous)
    if str(client.get_registered_model(name).aliases.get(CHALLENGER)) == move.champion:
        client.delete_registered_model_alias(name, CHALLENGER)
    client.delete_registered_model_tag(name, MOVE_TAG)


def _finish_interrupted_move(client: MlflowClient, platform: Platform, name: str) -> AliasMove | None:
    """If the alias `champion` has moved already, complete the interrupted move and return it. If `champion` has not
    moved yet, cancel the move.

    Return None if no alias move was completed.
    """
    aliases = _read_aliases(platform, client, name)
    recorded = client.get_registered_model(name).tags.get(MOVE_TAG)
    if recorded is None:
        return None
    move = AliasMove.model_validate_json(recorded)
    if aliases.get(CHAMPION) != move.champion:
        client.delete_registered_model_tag(name, MOVE_TAG)
        return None
    logger.info("completing an interrupted %s of model %s", move.kind, name)
    _finish_move(client, name, move)
    return move


def _read_aliases(platform: Platform, client: MlflowClient, name: str) -> dict[str, str]:
    """Return the aliases of a registered model with their version numbers.

    Raises:
        UserError: the registry has no model of this name.
    """
    try:
        return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    models = sorted(model.name for model in client.search_registered_models())
    raise UserError(
        "there is no such registered model",
        where=hide_secrets(platform.registry_uri),
        got=name,
        fix="train the model first: `lakesight pipeline`"
        + (f"; or choose the run of a registered model: {', '.join(models)}" if models else ""),
    )


def _label(version: ModelVersion) -> str:
    return f"model {version.name} version {version.version}"


def _create_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name, description=MODEL_DESCRIPTION)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def list_versions(client: MlflowClient, name: str) -> list[MlflowVersion]:
    """List all versions of a model, oldest first, without aliases, because Unity Catalog's search omits aliases."""
    found: list[MlflowVersion] = []
    token: str | None = None
    while token != "":
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        found += page
        token = page.token or ""
    return sorted(found, key=lambda version: int(version.version))


def _read_version(client: MlflowClient, name: str, number: str) -> ModelVersion:
    found = client.get_model_version(name, number)
    return ModelVersion(
        name=name,
        version=str(found.version),
        run_id=found.run_id or "",
        created_ms=int(found.creation_timestamp or 0),
        tags={k.removeprefix(TAG_PREFIX): v for k, v in found.tags.items() if k.startswith(TAG_PREFIX)},
        aliases=tuple(sorted(found.aliases)),
    )


def _prefixed(tags: Mapping[str, str]) -> dict[str, str]:
    """Add TAG_PREFIX to tag keys. For Unity Catalog, replace `. , - = / :` in keys and truncate long values."""
    return {f"{TAG_PREFIX}{re.sub('[.,=/: -]', '_', key)}": text[:MAX_TAG_CHARS].strip() for key, text in tags.items()}


@contextmanager
def _registry_errors(platform: Platform, model: str) -> Iterator[None]:
    """Convert errors of requests to StageFailed."""
    try:
        yield
    except REQUEST_ERRORS as error:
        raise registry_failure(platform, model, error) from error

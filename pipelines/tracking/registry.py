"""Functions that register the model of a run folder in MLflow's model registry, and look up versions.

A version contains weights, config, tokenizer, the code of the model, and pip requirements with exact version numbers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mlflow
from mlflow import MlflowClient
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

CHAMPION = "champion"
CHECKPOINT_TAG = "checkpoint"
"""Name of the tag in which a model version stores the name of its checkpoint. A version without this tag contains the
last checkpoint."""
GENERATION_TAG = "generation"
"""Name of the tag in which a model version stores a hash of its generation settings, if these differ from the settings
of its checkpoint."""
EVALUATION_STEP_TAG = "evaluation_step"
"""Name of the tag in which a model version stores the training step at which its evaluation was logged to MLflow."""
MAX_TAG_CHARS = 1000
VALIDATION = "val/"
"""Prefix of the names of those training metrics that become tags of a version. A version in Unity Catalog may have at
most 50 tags, including the tags that users add, so the other metrics are only in the MLflow run."""
ALREADY_EXISTS = ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS")
"""Error codes with which registries refuse to create a model that exists. MLflow's own client accepts both codes."""


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


class VersionNotFound(UserError):
    """Error for a model, a version or an alias that the registry does not have. An unreachable registry causes other
    errors."""


class ListedVersion(NamedTuple):
    """One version in a list of versions.

    Attributes:
        number: number of the version.
        run_id: id of the MLflow run that has registered the version.
        complete: whether the registry has all files of the version. In Unity Catalog, a version is incomplete while its
            files are uploaded, and stays incomplete if the upload is killed.
    """

    number: str
    run_id: str
    complete: bool


def register(
    run: RunFolder,
    run_id: str,
    platform: Platform,
    which: Register = "last",
    generation: GenerationConfig | None = None,
) -> ModelVersion:
    """Register a checkpoint of a finished run. If a version of this checkpoint with the same generation settings is
    registered already, return this version.

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
    result = read_json(run.result, Result)
    name = platform.model_name(run.read_run().config.name)
    checkpoint = find_checkpoint(run, result, which)
    with registry_errors(platform, f"model {name}"), files_to_register(checkpoint, generation) as files:
        _find_or_create_model(client, name)
        last = Path(result.checkpoint).name
        find = partial(_find_version, client, name, run_id, (checkpoint.name, files.generation), last)
        if registered := find():
            return registered
        require_intact(checkpoint)
        model_id = log_model(client, files.folder, run_id)
        metrics = result.metrics if checkpoint.name == last else metrics_of(run, checkpoint)
        tags = digest_tags(files.folder, model_id) | _describe_checkpoint(run, checkpoint, files.generation, metrics)
        created = client.create_model_version(
            name,
            f"models:/{model_id}",
            run_id=run_id,
            tags=_prefixed(tags),
            description=version_text(client, platform, run_id, step_of(checkpoint)),
            model_id=model_id,
        )
        number = str(created.version)
        if (oldest := find()) and oldest.version != number:
            # If the answer to a request is lost, MLflow repeats the request. A server that has executed both requests
            # has two versions.
            client.delete_model_version(name, number)
            number = oldest.version
        add_sections(client, run_id, {f"Version {number}": version_link(platform, name, number)})
    return read_version(client, name, number)


def _find_version(
    client: MlflowClient, name: str, run_id: str, wanted: tuple[str, str], last: str
) -> ModelVersion | None:
    """Return the oldest version of a checkpoint with certain generation settings, or None if there is none.

    Args:
        client: MLflow client.
        name: full name of the registered model.
        run_id: id of the MLflow run.
        wanted: values of the tags CHECKPOINT_TAG and GENERATION_TAG.
        last: name of the last checkpoint of the run, which a version without the tag CHECKPOINT_TAG contains.
    """
    for version in versions_of_run(client, name, run_id):
        if (version.tags.get(CHECKPOINT_TAG, last), version.tags.get(GENERATION_TAG, "")) == wanted:
            return version
    return None


def _describe_checkpoint(
    run: RunFolder, checkpoint: Path, generation: str, metrics: Mapping[str, float]
) -> dict[str, str]:
    """Return the tags that describe a checkpoint, its run, its generation settings and its validation metrics."""
    file = run.read_run()
    tags = {CHECKPOINT_TAG: checkpoint.name, "run": run.path.name}
    tags |= {"table_version": str(file.dataset_version), "manifest_hash": file.content_hash, **file.code_tags()}
    if generation:
        tags[GENERATION_TAG] = generation
    return tags | {f"training_{key}": f"{metrics[key]:.6g}" for key in metrics if key.startswith(VALIDATION)}


def training_step(platform: Platform, version: ModelVersion) -> int:
    """Return the training step of a version's checkpoint. For a version of Lakesight 0.1.0, this is the last step with
    a logged loss, or 0 if no loss was logged.
    """
    if CHECKPOINT_TAG in version.tags:
        return step_of(Path(version.tags[CHECKPOINT_TAG]))
    # Lakesight 0.1.0 registered only the last checkpoint, and did not store its step.
    client = connect(platform)
    with registry_errors(platform, version_label(version)):
        return max((point.step for point in client.get_metric_history(version.run_id, "train/loss")), default=0)


def describe_version(platform: Platform, version: ModelVersion, sections: Mapping[str, str]) -> None:
    """Replace or append sections in the description of a version."""
    client = connect(platform)
    with registry_errors(platform, version_label(version)):
        present = client.get_model_version(version.name, version.version).description or ""
        client.update_model_version(version.name, version.version, put_sections(present, sections))


def ensure_model(platform: Platform, name: str) -> None:
    """Find or create a registered model.

    Raises:
        UserError: the registry refuses the request.
        TrackingDown: the server does not answer.
    """
    try:
        _find_or_create_model(connect(platform), name)
    except REQUEST_ERRORS as error:
        raise unusable(platform, error) from None


def resolve(platform: Platform, name: str, which: str) -> ModelVersion:
    """Look up a version of a registered model by number, alias or `latest`.

    Args:
        platform: platform whose model registry is used.
        name: full name of the registered model.
        which: version to look up (a version number, an alias, or `latest`).

    Raises:
        VersionNotFound: the model, version or alias does not exist. The error lists the versions and aliases of the
            model or, if the model does not exist, the registered models.
        TrackingDown: the server does not answer.
        UserError: the server cannot be used.
        StageFailed: the registry rejects a request.
    """
    client = connect(platform)
    with registry_errors(platform, f"model {name}"):
        aliases = read_aliases(platform, client, name)
        numbers = [version.number for version in list_versions(client, name) if version.complete]
        number = choose_number(which, numbers, aliases)
        if number is None:
            listed = ", ".join(f"{alias} (= {version})" for alias, version in sorted(aliases.items())) or "none"
            raise VersionNotFound(
                f"model {name} has no version or alias {which!r}",
                where=hide_secrets(platform.registry_uri),
                got=f"versions: {', '.join(numbers) or 'none'}; aliases: {listed}",
                fix="choose one of these"
                + (" with --version; or run `lakesight promote` first" if which == CHAMPION else ""),
            )
        return read_version(client, name, number)


def label(platform: Platform, version: ModelVersion) -> str:
    """Return a text that names a version and its registry, for error messages."""
    return f"{version_label(version)} in {hide_secrets(platform.registry_uri)}"


def download_files(platform: Platform, version: ModelVersion, folder: Path) -> Path:
    """Download all files of a version into a folder, and return the subfolder that contains `MLmodel`.

    Raises:
        StageFailed: the files cannot be downloaded from the registry, the registry names no valid URI for the files, or
            the files are not a model that Lakesight registered.
    """
    client = connect(platform)
    with registry_errors(platform, version_label(version)):
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
    with registry_errors(platform, version_label(version)):
        for key, value in _prefixed(tags).items():
            client.set_model_version_tag(version.name, version.version, key, value)
        return read_version(client, version.name, version.version)


def set_alias(platform: Platform, version: ModelVersion, alias: str) -> ModelVersion:
    """Point an alias to a version and return the updated version."""
    client = connect(platform)
    with registry_errors(platform, version_label(version)):
        client.set_registered_model_alias(version.name, alias, version.version)
        return read_version(client, version.name, version.version)


def read_aliases(platform: Platform, client: MlflowClient, name: str) -> dict[str, str]:
    """Return the aliases of a registered model with their version numbers.

    Raises:
        VersionNotFound: the registry has no model of this name.
    """
    try:
        return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    models = sorted(
        model.name for model in client.search_registered_models() if model.name.startswith(platform.model_prefix)
    )
    raise VersionNotFound(
        "there is no such registered model",
        where=hide_secrets(platform.registry_uri),
        got=name,
        fix="train the model first: `lakesight pipeline`"
        + (f"; or choose the run of a registered model: {', '.join(models)}" if models else ""),
    )


def version_label(version: ModelVersion) -> str:
    """Return a text that names a version, for error messages."""
    return f"model {version.name} version {version.version}"


def _find_or_create_model(client: MlflowClient, name: str) -> None:
    """Create a registered model if the registry does not have it.

    The model is looked up first, because a user who may add versions to a model is not always allowed to create models.
    """
    try:
        client.get_registered_model(name)
        return
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    try:
        client.create_registered_model(name, description=MODEL_DESCRIPTION)
    except MlflowException as error:
        if error.error_code not in ALREADY_EXISTS:  # another process has created the model since the look-up
            raise


def list_versions(client: MlflowClient, name: str) -> list[ListedVersion]:
    """List all versions of a model, oldest first. Unity Catalog's search returns neither tags nor aliases."""
    found: list[ListedVersion] = []
    token: str | None = None
    while token != "":
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        found += [
            ListedVersion(str(version.version), version.run_id or "", complete=version.status == "READY")
            for version in page
        ]
        token = page.token or ""
    return sorted(found, key=lambda version: int(version.number))


def versions_of_run(client: MlflowClient, name: str, run_id: str) -> list[ModelVersion]:
    """Read the complete versions of a model that a run has registered, oldest first."""
    found = [version for version in list_versions(client, name) if version.run_id == run_id]
    for version in found:
        if not version.complete:
            logger.warning("version %s of model %s is ignored, because it lacks files", version.number, name)
    return [read_version(client, name, version.number) for version in found if version.complete]


def read_version(client: MlflowClient, name: str, number: str) -> ModelVersion:
    """Read a version of a model with its tags and aliases."""
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
    """Add TAG_PREFIX to tag keys. For Unity Catalog, replace spaces and `. , - = / :` in keys by `_`, and truncate long
    values.
    """
    return {f"{TAG_PREFIX}{re.sub('[.,=/: -]', '_', key)}": text[:MAX_TAG_CHARS].strip() for key, text in tags.items()}


@contextmanager
def registry_errors(platform: Platform, model: str) -> Iterator[None]:
    """Convert errors of requests to StageFailed."""
    try:
        yield
    except REQUEST_ERRORS as error:
        raise registry_failure(platform, model, error) from error

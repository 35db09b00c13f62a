"""Functions that download registered versions into the home folder, and list checkpoints that versions need."""

from __future__ import annotations

import errno
import logging
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipelines.formats.model_copy import ModelCopy, check_copy, record_copy
from pipelines.formats.run_folder import Result, RunFolder, read_json
from pipelines.platform import Platform
from pipelines.tracking.home_store.copied_version import (
    DIGEST_TAG,
    StoredVersion,
    check_registered_copy,
    copy_folder,
)
from pipelines.tracking.logged_model import ARTIFACTS, MODEL_FILES
from pipelines.tracking.registry import (
    CHECKPOINT_TAG,
    ListedVersion,
    ModelVersion,
    download_files,
    label,
    list_versions,
    read_version,
)
from pipelines.tracking.runs import logged_ids
from pipelines.tracking.server import REQUEST_ERRORS, connect, unusable
from pipelines.tracking.version_files import check_all_files, check_model_files

logger = logging.getLogger(__name__)

ABANDONED_SECONDS = 24 * 60 * 60
"""Time in seconds after which an incomplete copy counts as the remains of a killed download."""


class Download(NamedTuple):
    """Folder of a downloaded model version, and the digest of its files."""

    folder: Path
    digest: str


def download(platform: Platform, version: ModelVersion) -> Download:
    """Return the folder of a version's weights, config and tokenizer. Download the files if there is no intact copy.

    Raises:
        StageFailed: the files cannot be downloaded, or are not the files that were registered.
    """
    target = copy_folder(platform, version.name, StoredVersion(version.version, version.run_id, version.created_ms))
    copy = check_registered_copy(target, version.tags.get(DIGEST_TAG))
    if copy is not None:
        return Download(target, copy.digest)
    if target.exists():
        logger.warning("%s is damaged or was changed; the model version is downloaded again", target)
    return Download(target, _fetch(platform, version, target).digest)


def download_checked(platform: Platform, version: ModelVersion, folder: Path) -> Path:
    """Download all files of a version into a folder, for a process that will execute the version's own code.

    Returns:
        The subfolder that contains `MLmodel`.

    Raises:
        StageFailed: the files cannot be downloaded, or are not the files that were registered.
    """
    downloaded = download_files(platform, version, folder)
    check_all_files(downloaded, version.tags, label(platform, version))
    return downloaded


def _fetch(platform: Platform, version: ModelVersion, target: Path) -> ModelCopy:
    """Download a version, then rename its folder to `target`, so that no reader sees an incomplete folder."""
    partial = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with tempfile.TemporaryDirectory() as local:
            model = download_files(platform, version, Path(local))
            partial.mkdir(parents=True)
            for file in MODEL_FILES:
                shutil.copyfile(model / ARTIFACTS / file, partial / file)
        copy = record_copy(partial)
        check_model_files(copy.digest, version.tags, label(platform, version))
        return _replace_copy(target, partial, copy)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in _leftovers(target.parent):
            shutil.rmtree(folder, ignore_errors=True)


def _replace_copy(target: Path, partial: Path, copy: ModelCopy) -> ModelCopy:
    """Rename the folder `partial` to `target`, unless another process has just downloaded the same files."""
    while True:
        present = check_copy(target)
        if present is not None and present.digest == copy.digest:
            return present
        with suppress(FileNotFoundError):
            target.rename(target.with_name(f".{uuid.uuid4().hex}.old"))
        try:
            partial.rename(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            continue  # in the meantime, another process has renamed its folder to `target`
        return copy


def _leftovers(folder: Path) -> Iterator[Path]:
    """Yield replaced copies, and incomplete copies that a killed download has left more than a day ago."""
    yield from folder.glob(".*.old")
    for path in folder.glob(".*.tmp"):
        with suppress(FileNotFoundError):  # another process has just completed this download
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                yield path


def needed_checkpoints(platform: Platform) -> Callable[[RunFolder], Collection[str] | None]:
    """Return a function that takes a run, and returns the names of its checkpoints that have been registered.

    The function returns None for a run that was also logged to another tracking server, because the model versions on
    that server are not known.

    Raises:
        UserError: the tracking server refuses a request.
        TrackingDown: the tracking server does not answer.
    """
    client = connect(platform)

    @cache
    def versions(name: str) -> list[ListedVersion]:
        return list_versions(client, name)

    def needs(run: RunFolder) -> Collection[str] | None:
        ids = logged_ids(run)
        try:
            if not all(_knows(client, run_id) for run_id in ids):
                return None
            name = platform.model_name(run.read_run().config.name)
            numbers = [version.number for version in versions(name) if version.run_id in ids]
            tags = [read_version(client, name, number).tags for number in numbers]
        except REQUEST_ERRORS as error:
            raise unusable(platform, error) from None
        last = Path(read_json(run.result, Result).checkpoint).name if run.result.exists() else ""
        return {found.get(CHECKPOINT_TAG, last) for found in tags}

    return needs


def _knows(client: MlflowClient, run_id: str) -> bool:
    try:
        client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True

"""Download of registered model versions into the home folder."""

from __future__ import annotations

import logging
import shutil
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pipelines.config import short_hash
from pipelines.formats.model_copy import ModelCopy, check_copy, record_copy
from pipelines.platform import Platform
from pipelines.tracking.logged_model import MODEL_FILES
from pipelines.tracking.registry import ModelVersion, download_files, label
from pipelines.tracking.version_files import ARTIFACTS, DIGEST_TAG, check_all_files, check_model_files

logger = logging.getLogger(__name__)


class Download(NamedTuple):
    """Folder of a downloaded model version, and the digest of its files."""

    folder: Path
    digest: str


def download(platform: Platform, version: ModelVersion) -> Download:
    """Return the folder of a version's weights, config and tokenizer; download them if there is no intact copy.

    Two registries, or a registry that was deleted and created again, may have versions of the same name and number.
    Therefore the name of the folder also contains a hash of the version's MLflow run and creation time.

    Raises:
        StageFailed: the files cannot be downloaded, or are not the files that were registered.
    """
    key = short_hash(version.run_id, version.created_ms)
    target = platform.folder("models") / version.name / f"{version.version}-{key}"
    registered = version.tags.get(DIGEST_TAG)
    copy = check_copy(target)
    if copy is not None and registered in (None, copy.digest):
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
    """Download a version and put it at `target` in one step, so that no reader sees an incomplete folder."""
    partial = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with tempfile.TemporaryDirectory() as local:
            model = download_files(platform, version, Path(local))
            partial.mkdir(parents=True)
            for file in MODEL_FILES:
                shutil.copyfile(model / ARTIFACTS / file, partial / file)
        copy = record_copy(partial)
        check_model_files(copy.digest, version.tags, label(platform, version))
        present = check_copy(target)
        if present is not None and present.digest == copy.digest:
            return present  # another process has just downloaded the same files
        with suppress(FileNotFoundError):
            target.rename(target.with_name(f".{uuid.uuid4().hex}.old"))
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for old in target.parent.glob(".*.old"):
            shutil.rmtree(old, ignore_errors=True)
    return copy

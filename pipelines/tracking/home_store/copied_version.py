"""Look up a model version that is already downloaded, without importing MLflow.

`import mlflow` takes longer than the rest of most commands. A command that only reads the files of a model version
therefore first looks up the version in the store of the home folder without MLflow. If this module does not find the
version, MLflow looks it up (`registry.resolve`), downloads its files, and reports errors.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pipelines.config import short_hash
from pipelines.formats.model_copy import ModelCopy, check_copy
from pipelines.platform import Platform
from pipelines.tracking.home_store.store_file import open_store, store_file, store_uris

logger = logging.getLogger(__name__)

TAG_PREFIX = "lakesight_"
"""Prefix of the tags that Lakesight gives to model versions."""
DIGEST_TAG = "digest"
"""Name of the tag that stores the digest of the model files of a model version."""
DELETED = "Deleted_Internal"
"""Value of `current_stage` in the row of a version that a user has deleted. MLflow keeps the row of the version."""


class StoredVersion(NamedTuple):
    """Row of a model version in the store.

    Attributes:
        number: version number, as a text.
        run_id: id of the MLflow run that trained the version, or empty.
        created_ms: time at which the registry created the version, in milliseconds since the epoch.
    """

    number: str
    run_id: str
    created_ms: int


class CopiedVersion(NamedTuple):
    """Model version whose files are in the home folder.

    Attributes:
        number: version number, as a text.
        run_id: id of the MLflow run that trained the version, or empty.
        folder: folder of the version's files.
        digest: digest of these files.
    """

    number: str
    run_id: str
    folder: Path
    digest: str


def choose_number(which: str, numbers: Sequence[str], aliases: Mapping[str, str]) -> str | None:
    """Return the number of a version, or None if the model has no such version.

    Args:
        which: version number, alias or `latest`. Digits always mean the number, although MLflow also accepts an alias
            that consists of digits.
        numbers: numbers of all versions of the model, oldest first.
        aliases: version number of each alias, by name of the alias.
    """
    if which == "latest" and numbers:
        return numbers[-1]
    number = which if which.isdecimal() else aliases.get(which, which)
    return number if number in numbers else None


def copy_folder(platform: Platform, model: str, version: StoredVersion) -> Path:
    """Return the folder for the downloaded files of a version.

    Two registries, or a registry that was deleted and created again, may have versions of the same name and number.
    Therefore the name of the folder also contains a hash of the version's MLflow run and creation time.
    """
    key = short_hash(version.run_id, version.created_ms)
    return platform.folder("models") / model / f"{version.number}-{key}"


def check_registered_copy(folder: Path, registered: str | None) -> ModelCopy | None:
    """Return the record of a version's downloaded files, or None if the files are missing, damaged or were changed.

    Args:
        folder: folder of the files.
        registered: digest in the tags of the version, or None for a version that an earlier release registered.
    """
    copy = check_copy(folder)
    return copy if copy is not None and registered in (None, copy.digest) else None


def find_copied_version(platform: Platform, model: str, which: str) -> CopiedVersion | None:
    """Look up a model version in the store of the home folder, and find the downloaded files of this version.

    Return None if MLflow must look up the version: the registry is not the store of the home folder, the store cannot
    be read, the version does not exist, or an intact copy of its files is missing.

    Args:
        platform: platform whose registry is used.
        model: full name of the registered model.
        which: version number, alias or `latest`.
    """
    found = find_stored_version(platform, model, which)
    if found is None:
        return None
    version, digest = found
    folder = copy_folder(platform, model, version)
    copy = check_registered_copy(folder, digest)
    return CopiedVersion(version.number, version.run_id, folder, copy.digest) if copy else None


def has_no_registry(platform: Platform) -> bool:
    """Return true if the registry is the store of the home folder and this store does not exist yet."""
    return platform.registry_uri in store_uris(platform) and not store_file(platform).is_file()


def find_stored_version(platform: Platform, model: str, which: str) -> tuple[StoredVersion, str | None] | None:
    """Look up a model version and the digest in its tags in the store of the home folder.

    Return None if MLflow must look up the version: the registry is not the store of the home folder, the store cannot
    be read, or the version does not exist. The digest is None for a version that Lakesight 0.1.0 registered.

    Args:
        platform: platform whose registry is used.
        model: full name of the registered model.
        which: version number, alias or `latest`.
    """
    file = store_file(platform)
    if not {platform.tracking_uri, platform.registry_uri} <= store_uris(platform) or not file.is_file():
        return None
    try:
        with open_store(file, "ro") as store:
            return _read_version(store, model, which)
    except sqlite3.Error as error:
        logger.info(
            "MLflow looks up version %s of %s, because its store cannot be read directly: %s", which, model, error
        )
        return None


def _read_version(store: sqlite3.Connection, model: str, which: str) -> tuple[StoredVersion, str | None] | None:
    """Return a version and the digest in its tags, or None if the model has no such version.

    A store with several workspaces may have several models of the same name. In this case, MLflow must choose among the
    models, so the result is None.
    """
    rows = store.execute(
        "SELECT version, run_id, creation_time FROM model_versions WHERE name = ? AND current_stage IS NOT ? "
        "ORDER BY version",
        (model, DELETED),
    ).fetchall()
    versions = {str(number): StoredVersion(str(number), run_id or "", int(ms or 0)) for number, run_id, ms in rows}
    aliases = store.execute("SELECT alias, version FROM registered_model_aliases WHERE name = ?", (model,)).fetchall()
    if len(versions) < len(rows) or len(dict(aliases)) < len(aliases):
        return None
    number = choose_number(which, list(versions), {alias: str(version) for alias, version in aliases})
    if number is None:
        return None
    tags = store.execute(
        "SELECT value FROM model_version_tags WHERE name = ? AND version = ? AND key = ?",
        (model, int(number), f"{TAG_PREFIX}{DIGEST_TAG}"),
    ).fetchall()
    return versions[number], tags[0][0] if tags else None

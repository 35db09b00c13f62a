"""Functions that correct the artifact locations in the MLflow store of a home folder that was moved, copied or renamed.

MLflow's SQLite store contains absolute artifact locations of experiments, runs and models. When the store in a home
folder is opened, locations below an earlier path of the home folder are replaced by locations below the present path.
"""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipelines.errors import UserError
from pipelines.platform import Platform
from pipelines.tracking.home_store.store_file import open_store, store_file, store_uris

logger = logging.getLogger(__name__)

LOCATIONS = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("storage_location", "source"),
}
"""Dict from each SQLite table with artifact locations to the names of the columns that contain the locations."""


def artifact_root(platform: Platform) -> Path:
    """Return the folder in the home folder that contains all MLflow artifacts."""
    return platform.root / "mlartifacts"


def follow_moved_home(platform: Platform) -> None:
    """Correct the artifact locations in the home folder's store if the path of the home folder has changed.

    Raises:
        UserError: the store cannot be written.
    """
    file = store_file(platform)
    if not store_uris(platform) & {platform.tracking_uri, platform.registry_uri} or not file.is_file():
        return
    with open_store(file, "rw") as store:
        try:
            moved = [old for old in _other_roots(store, platform) if _is_moved(store, old, artifact_root(platform))]
        except sqlite3.Error:
            return  # MLflow itself reports a store that cannot be read
        for old in moved:
            try:
                with store:
                    _replace(store, old, artifact_root(platform).as_uri())
                    # A version that a user registered from a folder has a plain path instead of a URI.
                    _replace(store, _path_of(old), str(artifact_root(platform)))
            except sqlite3.Error as error:
                raise UserError(
                    "the MLflow store of a moved home folder cannot be updated",
                    where=str(file),
                    got=str(error),
                    fix="end other commands that use this home folder, make the file writable, and try again",
                ) from None
            logger.info(
                "the home folder was moved: MLflow now looks for artifacts in %s instead of %s", platform.root, old
            )


def _other_roots(store: sqlite3.Connection, platform: Platform) -> list[str]:
    """Return the artifact locations of experiments that were created when the home folder had another path."""
    rows = store.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
    name = artifact_root(platform).name
    own = artifact_root(platform).as_uri()
    return [old for (old,) in rows if old and old.startswith("file:") and old.endswith(f"/{name}") and old != own]


def _is_moved(store: sqlite3.Connection, old: str, present: Path) -> bool:
    """Return whether the artifacts at the location `old` are now in the folder `present`.

    The old folder may still exist, for example because the home folder was copied. If the old folder exists, the result
    is true if `present` contains the artifacts of at least one run or model.
    """
    folder = Path(_path_of(old))
    if not folder.exists():
        return True
    if present.exists() and folder.samefile(present):
        return False  # both paths lead to the same folder, for example through a symbolic link
    rests = [
        location.removeprefix(f"{old}/")
        for table in ("runs", "logged_models")
        for (location,) in store.execute(f"SELECT {LOCATIONS[table][0]} FROM {table}")  # noqa: S608 (our own names)
        if location and location.startswith(f"{old}/")
    ]
    return any((present / unquote(rest)).exists() for rest in rests)


def _replace(store: sqlite3.Connection, old: str, new: str) -> None:
    """Replace an artifact location and all locations below this location."""
    for table, column in ((table, column) for table, columns in LOCATIONS.items() for column in columns):
        store.execute(
            f"UPDATE {table} SET {column} = ? || substr({column}, ?) "  # noqa: S608 (our own names)
            f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
            (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
        )


def _path_of(location: str) -> str:
    """Return the path of a file URI."""
    return unquote(urlsplit(location).path)

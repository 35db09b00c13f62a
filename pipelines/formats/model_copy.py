"""Local copies of a model's files, and the digest that identifies a model by the content of its files.

A copy is a folder with the file RECORD, which is written last. The record lists the size, the times of change and the
SHA-256 of each file. Before each use of a copy, the sizes and times of its files are compared with the record. The
weights are read only if all sizes are equal and a time differs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from vlm.config import Config
from vlm.files import atomic_write, file_digest

RECORD = "copy.json"


class CopiedFile(Config):
    """Record of one file of a copy: size in bytes, times in nanoseconds, and SHA-256.

    Programs can set the modification time (`rsync --times`, `cp -p`, `touch`). Only the kernel sets the time at which
    the content or the metadata of a file changed (ctime).
    """

    size: int
    modified_ns: int
    changed_ns: int = -1
    """ctime; -1 in a record of an earlier version of Lakesight."""
    sha256: str


class ModelCopy(Config):
    """Content of RECORD: the files of a complete copy, by name."""

    files: dict[str, CopiedFile]

    @property
    def digest(self) -> str:
        """Digest of the copied model, computed from the SHA-256 of its files."""
        return combine_digests({name: file.sha256 for name, file in self.files.items()})


def combine_digests(digests: Mapping[str, str]) -> str:
    """Return the digest of a model, which is a hash of the names and SHA-256 of all its files."""
    return hashlib.sha256(json.dumps(dict(digests), sort_keys=True).encode()).hexdigest()


def record_copy(folder: Path) -> ModelCopy:
    """Hash the files of a complete copy, and write the record of the copy."""
    # The states are read before the files are hashed, so that a later check detects a change during the hashing.
    states = {path: path.stat() for path in model_files(folder)}
    files = {
        path.name: CopiedFile(
            size=state.st_size,
            modified_ns=state.st_mtime_ns,
            changed_ns=state.st_ctime_ns,
            sha256=file_digest(path),
        )
        for path, state in states.items()
    }
    copy = ModelCopy(files=files)
    with atomic_write(folder / RECORD) as temporary:
        temporary.write_text(copy.model_dump_json(indent=2), encoding="utf-8")
    return copy


def check_copy(folder: Path) -> ModelCopy | None:
    """Return the record of a copy if its files are unchanged, else None.

    If the result is None, the caller copies the model again. If only the times of files have changed, for example in a
    copied home folder, the SHA-256 of each file is compared with the record. If no SHA-256 differs, a new record is
    written and returned.
    """
    try:
        recorded = ModelCopy.model_validate_json((folder / RECORD).read_text(encoding="utf-8"))
        states = {path.name: path.stat() for path in model_files(folder)}
    except (OSError, ValidationError, UnicodeDecodeError):
        return None
    if {name: file.size for name, file in recorded.files.items()} != {n: state.st_size for n, state in states.items()}:
        return None
    times = {name: (state.st_mtime_ns, state.st_ctime_ns) for name, state in states.items()}
    if all(times[name] == (file.modified_ns, file.changed_ns) for name, file in recorded.files.items()):
        return recorded
    if any(file_digest(folder / name) != file.sha256 for name, file in recorded.files.items()):
        return None
    return record_copy(folder)


def changed_files(folder: Path) -> list[str]:
    """List the recorded files of a copy that are missing or have another SHA-256. The copy itself is not changed.

    Raises:
        OSError: the copy has no record, or a file cannot be read.
        ValueError: the record is damaged.
    """
    recorded = ModelCopy.model_validate_json((folder / RECORD).read_text(encoding="utf-8"))
    return [
        name
        for name, file in recorded.files.items()
        if not (folder / name).is_file() or file_digest(folder / name) != file.sha256
    ]


def model_files(folder: Path) -> list[Path]:
    """List the files in a model's folder, except the file RECORD."""
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name != RECORD)

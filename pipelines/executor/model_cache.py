"""Cache of model files on the host's local disk, shared by all processes of the user on the host.

The first process copies the files while it holds a lock, and all other processes wait for the lock. A copy gets its
final name when the copy is complete, so a killed process never leaves a copy that looks complete. The name of a copy is
a hash of the model folder's path, the model's digest, and the names, sizes and modification times of the model's files.
If the files of a copy differ from the record of the copy, the model is copied again. Only the most recently used models
are kept.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pipelines.config import short_hash
from pipelines.errors import StageFailed
from pipelines.formats.model_copy import check_copy, model_files, record_copy
from pipelines.host_cache import exclusive_lock, user_cache_folder

KEPT = 3
"""Number of models that the cache keeps.

Older copies can be removed, because each process finishes reading its copy within seconds.
"""


def local_copy(folder: Path, digest: str = "", root: Path | None = None) -> Path:
    """Return the folder of a local copy of a model. Copy the files if the cache has no intact copy.

    Args:
        folder: complete model folder on a network, whose files never change.
        digest: digest of the model, or empty if the digest is not known.
        root: folder of the cache, by default a folder of this user in the system's temporary folder.

    Raises:
        StageFailed: the cache folder belongs to another user, who could replace models, or the files in `folder` do not
            have the digest.
        OSError: the model's folder cannot be read, or the disk is full.
    """
    root = user_cache_folder("models", root)
    files = model_files(folder)
    state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    target = root / short_hash(str(folder), digest, state)
    with exclusive_lock(root):
        if check_copy(target) is None:
            _copy(files, target, digest)
        os.utime(target)
        _remove_others(root)
    return target


def _copy(files: list[Path], target: Path, digest: str) -> None:
    partial = target.with_suffix(".part")
    # no running process writes this copy, because this process holds the lock
    for left in (partial, target):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir()
    for path in files:
        shutil.copyfile(path, partial / path.name)
    copied = record_copy(partial).digest
    if digest and copied != digest:
        raise StageFailed(
            "a model cannot be copied to this host",
            where=str(files[0].parent),
            got=f"files with the digest {copied}, expected {digest}",
            fix="run the command again, which downloads the model again if its files differ from the registry's",
        )
    partial.rename(target)


def _remove_others(root: Path) -> None:
    """Remove all incomplete copies. Of the complete copies, keep the KEPT copies that were used most recently."""
    copies = sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    complete = [path for path in copies if not path.suffix]
    for path in {*copies} - {*complete[-KEPT:]}:
        shutil.rmtree(path, ignore_errors=True)

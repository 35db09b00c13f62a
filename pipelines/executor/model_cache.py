"""Cache of model files on the host's local disk, shared by all processes of the user on the host.

The cache has two kinds of copies: copies of models that are on a network, and copies whose weights are converted to
another precision. The first process makes a copy while it holds a lock, and all other processes wait for the lock. A
copy gets its final name when the copy is complete, so a killed process never leaves a copy that looks complete. The
name of a copy is a hash of the model folder's path, the model's digest, the conversion, and the state of the model's
files (names, sizes and modification times). If the files of a copy differ from the record of the copy, the copy is made
again. Only the most recently used copies are kept.

Processes map the weights of a copy into memory. A process whose copy is removed can still read the weights, because the
system removes a mapped file only when no process maps the file any more. Files of a copy are never overwritten.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines.config import short_hash
from pipelines.errors import StageFailed
from pipelines.formats.model_copy import check_copy, model_files, record_copy
from pipelines.host_cache import exclusive_lock, user_cache_folder

KEPT = 4
"""Number of copies that the cache keeps. Four are enough for two models, each with a copy of its weights in bf16."""


def local_copy(folder: Path, digest: str = "", root: Path | None = None) -> Path:
    """Return the folder of a local copy of a model. Copy the files if the cache has no intact copy.

    Args:
        folder: complete model folder on a network, whose files never change.
        digest: digest of the model, or empty if the digest is not known.
        root: folder of the cache, by default a folder of this user in the system's temporary folder.

    Raises:
        StageFailed: the files in `folder` do not have the digest, or the cache folder belongs to another user, who
            could replace models.
        OSError: the model's folder cannot be read, or the disk is full.
    """
    files = model_files(folder)

    def copy_files(target: Path) -> None:
        for path in files:
            shutil.copyfile(path, target / path.name)
        copied = record_copy(target).digest
        if digest and copied != digest:
            raise StageFailed(
                "a model cannot be copied to this host",
                where=str(folder),
                got=f"files with the digest {copied}, expected {digest}",
                fix="run the command again, which downloads the model again if its files differ from the registry's",
            )

    return _find_or_make(_copy_name(folder, digest), copy_files, root)


def converted_copy(
    folder: Path,
    digest: str,
    conversion: Sequence[str],
    convert: Callable[[Path, Path], None],
    root: Path | None = None,
) -> Path:
    """Return the folder of a model whose weights are converted. Convert the model if the cache has no intact copy.

    Args:
        folder: complete model folder on a local disk, whose files never change.
        digest: digest of the model, or empty if the digest is not known.
        conversion: values that determine the result of the conversion, such as the precision.
        convert: function of two folders, which reads the model in the first folder and writes the converted model into
            the second folder.
        root: folder of the cache, by default a folder of this user in the system's temporary folder.

    Raises:
        StageFailed: the cache folder belongs to another user, who could replace models.
        OSError: the model's folder cannot be read, or the disk is full.
    """

    def write(target: Path) -> None:
        convert(folder, target)
        record_copy(target)

    return _find_or_make(_copy_name(folder, digest, *conversion), write, root)


def _copy_name(folder: Path, digest: str, *conversion: str) -> str:
    state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in model_files(folder)]
    return short_hash(str(folder), digest, state, *conversion)


def _find_or_make(name: str, make: Callable[[Path], None], root: Path | None) -> Path:
    """Return the folder of the copy with the given name. If there is no intact copy, call `make`, which fills a new
    folder."""
    root = user_cache_folder("models", root)
    target = root / name
    with exclusive_lock(root):
        if check_copy(target) is None:
            part = target.with_suffix(".part")
            # no running process writes this copy, because this process holds the lock
            for left in (part, target):
                shutil.rmtree(left, ignore_errors=True)
            part.mkdir()
            make(part)
            part.rename(target)
        os.utime(target)
        _remove_others(root)
    return target


def _remove_others(root: Path) -> None:
    """Remove all incomplete copies. Of the complete copies, keep the KEPT copies that were used most recently."""
    copies = sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    complete = [path for path in copies if not path.suffix]
    for path in {*copies} - {*complete[-KEPT:]}:
        shutil.rmtree(path, ignore_errors=True)

"""Cache of model files on the host's local disk, shared by all processes of the user on the host.

The cache has two kinds of copies: copies of models that are on a network, and copies whose weights are converted to
another precision. The first process makes a copy while it holds a lock, and all other processes wait for the lock. A
copy gets its final name when the copy is complete, so a killed process never leaves a copy that looks complete. The
name of a copy is a hash of the model folder's path, the model's digest, the conversion, and the state of the model's
files (names, sizes and modification times). If the files of a copy differ from the record of the copy, the copy is made
again. Only the most recently used copies are kept. If the disk is full, the copies that were used least recently are
removed, until there is room for the new copy.

Processes map the weights of a copy into memory. A process whose copy is removed can still read the weights, because the
system removes a mapped file only when no process maps the file any more. Files of a copy are never overwritten.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pipelines.config import short_hash
from pipelines.errors import StageFailed
from pipelines.formats.model_copy import check_copy, model_files, record_copy
from pipelines.host_cache import exclusive_lock, user_cache_folder

log = logging.getLogger(__name__)

KEPT = 4
"""Number of copies that the cache keeps. Four are enough for two models, each with a copy of its weights in bf16."""


def local_copy(folder: Path, digest: str = "", root: Path | None = None) -> Path:
    """Return the folder of a local copy of a model. Copy the files if the cache has no intact copy.

    Args:
        folder: complete model folder on a network, whose files never change.
        digest: digest of the model, or empty if the digest is not known.
        root: folder of the cache, by default a folder of this user in the system's temporary folder.

    Raises:
        StageFailed: the files in `folder` do not have the digest, or another user could replace models in the cache
            folder.
        OSError: the model's folder cannot be read, or the disk is too small for the copy.
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
                fix="run the command again: it downloads the model again if a file differs from the registry",
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
        StageFailed: another user could replace models in the cache folder.
        OSError: the model's folder cannot be read, or the disk is too small for the copy.
    """

    def write(target: Path) -> None:
        convert(folder, target)
        record_copy(target)

    return _find_or_make(_copy_name(folder, digest, *conversion), write, root, source=folder)


def _copy_name(folder: Path, digest: str, *conversion: str) -> str:
    state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in model_files(folder)]
    return short_hash(str(folder), digest, state, *conversion)


def _find_or_make(name: str, make: Callable[[Path], None], root: Path | None, source: Path | None = None) -> Path:
    """Return the folder of the copy with the given name. If there is no intact copy, call `make`, which fills a new
    folder.

    If `make` reads a folder that may be in the cache, `source` is this folder. The folder `source` is not removed when
    the disk is full.
    """
    root = user_cache_folder("models", root)
    target = root / name
    with exclusive_lock(root):
        # No running process writes an incomplete copy, because this process holds the lock.
        _remove(root.glob("*.part"))
        if check_copy(target) is None:
            _remove([target])
            _make(part := target.with_suffix(".part"), make, source)
            part.rename(target)
        os.utime(target)
        _remove(_complete_copies(root)[:-KEPT])
    return target


def _make(part: Path, make: Callable[[Path], None], source: Path | None) -> None:
    """Let `make` fill a new folder. While the disk is full, remove the least recently used copy and try again."""
    while True:
        part.mkdir()
        try:
            make(part)
        except Exception as error:
            _remove([part])
            others = [path for path in _complete_copies(part.parent) if path != source]
            if not (_is_full(error) and others):
                raise
            log.warning("the disk of %s is full; the model copy %s is removed", part.parent, others[0].name)
            _remove(others[:1])
        else:
            return


def _is_full(error: Exception) -> bool:
    """Return whether an error says that the disk or the quota is full. An error of safetensors has no error code."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in codes
    return any(f"(os error {code})" in str(error) for code in codes)


def _complete_copies(root: Path) -> list[Path]:
    """List the complete copies, from the least to the most recently used."""
    copies = [path for path in root.iterdir() if path.is_dir() and not path.suffix]
    return sorted(copies, key=lambda path: path.stat().st_mtime)


def _remove(folders: Iterable[Path]) -> None:
    for folder in list(folders):
        shutil.rmtree(folder, ignore_errors=True)

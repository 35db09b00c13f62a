"""Helpers that run a command while a folder is on a small or read-only disk, in a mount namespace that ends with the
command.

A mount namespace inside a user namespace needs no privileges. If the small disk is full, the kernel returns the same
error as for a real disk (ENOSPC).
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

SMALL_DISK = """
mkdir "$COPY" && mount -t tmpfs tmpfs "$COPY" && cp -a "$FOLDER/." "$COPY" || exit 99
USED=$(df -k --output=used "$COPY" | tail -1)
mount -o "remount,size=$((USED + FREE_KIB))k" "$COPY" && mount --bind "$COPY" "$FOLDER" || exit 99
"$@"
CODE=$?
cp -a "$FOLDER/." "$COPY.saved"
exit $CODE
"""

READ_ONLY_DISK = """
mount --bind "$FOLDER" "$FOLDER" && mount -o remount,ro,bind "$FOLDER" || exit 99
"$@"
"""


def can_mount() -> bool:
    """Return whether this user may mount a file system in a namespace."""
    unshare = shutil.which("unshare")
    return bool(unshare) and not subprocess.run([*_namespace("mount -t tmpfs tmpfs /mnt")], check=False).returncode


def run_on_small_disk(
    command: Sequence[str], folder: Path, free_kib: int, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a command while a folder is on a separate disk with little free space.

    Afterwards, the folder contains all files that the command wrote.
    """
    copy = folder.with_name(f"{folder.name}.disk")
    names = {"FOLDER": str(folder), "COPY": str(copy), "FREE_KIB": str(free_kib)}
    done = _run(SMALL_DISK, command, {**environment, **names})
    shutil.rmtree(folder)
    copy.with_name(f"{copy.name}.saved").rename(folder)
    copy.rmdir()
    return done


def run_on_read_only_disk(
    command: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a command while a folder is on a disk that is mounted read-only."""
    return _run(READ_ONLY_DISK, command, {**environment, "FOLDER": str(folder)})


def _run(script: str, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*_namespace(script), "sh", *command], env=dict(environment), capture_output=True, text=True, check=False
    )
    assert done.returncode != 99, done.stderr
    return done


def _namespace(script: str) -> list[str]:
    return ["unshare", "--mount", "--map-root-user", "sh", "-c", script]

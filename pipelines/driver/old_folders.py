"""Removal of old run, checkpoint, shard and report folders, for `lakesight maintain --keep`.

The newest folders of each group of similar folders stay, and so does everything that a remaining folder or a registered
version needs:

- a run that may still be training, or whose model waits for registration, or whose weights a remaining run starts from;
- if a version was registered from a run, the files of the run, except earlier checkpoints without a version;
- the shards of every remaining run, and the shards that a remaining training mix refers to.

Runs whose registered versions are not known also stay, and so do runs and shards that Lakesight cannot read. Listing
the folders and removing them may take minutes, in which other commands may begin to use a listed folder. Just before a
folder is renamed, this command therefore applies the rules again. Before this command applies the rules again to the
folders of a run, the command becomes the owner of the run (`own_run`). No other process can then train the run. If
another process owns the run, the folders of the run stay. All folders are renamed before the first folder is removed.
Without the new names, a killed command could leave a half-removed folder that looks complete.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

from pipelines.errors import UserError
from pipelines.formats.run_folder import RunFile, RunFolder
from pipelines.formats.run_owner import own_run
from pipelines.formats.shards import MANIFEST, Manifest, read_manifest
from pipelines.platform import Platform
from vlm.config import Config
from vlm.errors import LakesightError

log = logging.getLogger(__name__)

RUNNING = timedelta(days=2)
"""An unfinished run that changed a file within this time may still be training or waiting for a restart."""
TRASH = ".removed-"
"""Prefix of the names of folders that are being removed."""

Kind = Literal["run", "checkpoint", "shards", "report"]
LEFTOVERS: dict[Kind, str] = {
    "run": "runs",
    "checkpoint": "runs/*/checkpoints",
    "shards": "shards",
    "report": "reports",
}
"""Folders (as patterns below the home folder) in which a killed command may leave a half-removed folder."""
Needs = Callable[[RunFolder], Collection[str] | None]
"""Function that returns, for a run folder, the names of the checkpoints that were registered as model versions, or None
if these names are not known."""
T = TypeVar("T")


class OldFolder(Config):
    """A folder or an HTML page that nothing needs any more.

    Attributes:
        kind: kind of the folder, which is 'run', 'checkpoint', 'shards' or 'report'.
        path: absolute path of the folder or HTML page.
        bytes: total size of all files in the folder, in bytes.
    """

    kind: Kind
    path: Path
    bytes: int


def find_old_folders(platform: Platform, keep: int, needs: Needs) -> list[OldFolder]:
    """Find the folders that `remove_folders` may remove. This function removes nothing.

    Args:
        platform: platform whose home folder contains the folders.
        keep: number of folders to keep in each group of similar folders; the newest folders are kept. Runs with the
            same name form a group, and so do shards that differ only in the table version, and reports on the same
            subject.
        needs: function that returns, for a run folder, the names of the checkpoints that were registered as model
            versions.

    Raises:
        UserError: `keep` is below 1.
    """
    if keep < 1:
        raise UserError(
            "at least one folder of each kind must be kept",
            where="--keep",
            got=str(keep),
            fix="set --keep to 1 or more",
        )
    return [OldFolder(kind=kind, path=path, bytes=_size(path)) for kind, path in _find(platform, keep, needs)]


def _find(platform: Platform, keep: int, needs: Needs, owned: RunFolder | None = None) -> list[tuple[Kind, Path]]:
    """Find the absolute paths of the old folders. `owned` is a run that this process owns, or None."""
    runs = _read_runs(platform.folder("runs"))
    old, kept = _split_runs(runs, keep, needs, owned)
    found: list[tuple[Kind, Path]] = [("run", path) for path in old]
    for run in kept:
        found += [("checkpoint", path) for path in _old_checkpoints(run, kept[run], needs)]
    used = {run.shard_folder(name).name for run in kept for name in _shards_of(runs[run])}
    found += [("shards", path) for path in _old_shards(platform.folder("shards"), keep, used)]
    found += [("report", path) for path in _old_reports(platform.folder("reports"), keep)]
    for kind, pattern in LEFTOVERS.items():
        found += [(kind, path) for path in platform.root.glob(f"{pattern}/{TRASH}*")]
    return [(kind, path.absolute()) for kind, path in found]


def remove_folders(
    platform: Platform, keep: int, folders: Iterable[OldFolder], find_needs: Callable[[], Needs]
) -> list[OldFolder]:
    """Remove the folders that `find_old_folders` has found, except folders that another command uses in the meantime.

    Args:
        platform: platform whose home folder contains the folders.
        keep: number of folders to keep in each group, as for `find_old_folders`.
        folders: folders to remove.
        find_needs: function that asks the model registry again, and returns a new function `needs`.

    Returns:
        The removed folders, without folders that another command has removed.
    """
    groups: dict[RunFolder | None, list[OldFolder]] = defaultdict(list)
    for folder in folders:
        groups[_run_of(folder)].append(folder)
    others = groups.pop(None, [])
    listed = cache(find_needs())

    def find_now(run: RunFolder | None) -> set[Path]:
        """Return the paths of the folders that are old now.

        The registry is asked again about `run`, or about all runs if `run` is None.
        """
        now = find_needs()
        needs = now if run is None else lambda other: now(other) if other == run else listed(other)
        return {path for _, path in _find(platform, keep, needs, run)}

    renamed: list[tuple[OldFolder, Path]] = []
    for run, group in groups.items():
        if run is not None:
            renamed += _rename_of_run(group, run, find_now)
    renamed += _rename_old(others, find_now(None) if others else ())
    for _, path in renamed:
        with suppress(FileNotFoundError):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    return [folder for folder, _ in renamed]


def _run_of(folder: OldFolder) -> RunFolder | None:
    """Return the run to which a folder belongs, or None for shards, reports and half-removed folders."""
    if folder.kind not in ("run", "checkpoint") or folder.path.name.startswith(TRASH):
        return None
    return RunFolder(folder.path if folder.kind == "run" else folder.path.parent.parent)


def _rename_of_run(
    group: list[OldFolder], run: RunFolder, find_now: Callable[[RunFolder], Collection[Path]]
) -> list[tuple[OldFolder, Path]]:
    """Rename the old folders of one run while this process owns the run. If the run may be in use, rename nothing."""
    if not run.run_file.exists() or _may_be_training(run):
        return []
    with ExitStack() as stack:
        try:
            stack.enter_context(own_run(run, may_remove=True))
        except UserError as error:
            log.info("%s is kept: %s", run.path, error)
            return []
        return _rename_old(group, find_now(run))


def _rename_old(group: list[OldFolder], old: Collection[Path]) -> list[tuple[OldFolder, Path]]:
    """Rename the folders of a group that `old` contains. Return each renamed folder with its new path."""
    renamed = []
    for folder in group:
        path = folder.path
        if path not in old:
            continue
        with suppress(FileNotFoundError):
            if not path.name.startswith(TRASH):
                path = path.rename(path.with_name(f"{TRASH}{path.name}"))
            renamed.append((folder, path))
    return renamed


def _read_runs(folder: Path) -> dict[RunFolder, RunFile]:
    """Return the runs in a folder, each with the contents of its run.json. Leave out runs without a valid run.json."""
    found: dict[RunFolder, RunFile] = {}
    for path in sorted(folder.absolute().glob("[!.]*/run.json")):
        try:
            found[RunFolder(path.parent)] = RunFolder(path.parent).read_run()
        except LakesightError:
            continue  # keep a folder of another program or of a newer release
    return found


def _split_runs(
    runs: dict[RunFolder, RunFile], keep: int, needs: Needs, owned: RunFolder | None
) -> tuple[list[Path], dict[RunFolder, bool]]:
    """Return the run folders to remove, and a dict of the remaining runs. The value of a run is true if all of its
    checkpoints stay."""
    newest = set(_newest(runs, keep, lambda run: runs[run].config.name, lambda run: run.run_file))
    whole = {run for run in runs if run in newest or _may_be_training(run, owned) or needs(run) is None}
    while True:  # if a run starts from the weights of an earlier run, the earlier run stays
        starts = [Path(start).parts for run in whole if (start := runs[run].config.train.start_from)]
        # Only the names of the folders are compared, because the home folder may have been moved after the training.
        needed = {run for run in runs if any(run.path.name in parts for parts in starts)}
        if needed <= whole:
            break
        whole |= needed
    kept = {run: run in whole for run in runs if run in whole or needs(run)}
    return [run.path for run in runs if run not in kept], kept


def _may_be_training(run: RunFolder, owned: RunFolder | None = None) -> bool:
    if run.unregistered.exists():
        return True
    files = [run.run_file, *run.path.glob("heartbeat/*")]
    if run != owned:  # the lease of the run `owned` was written by this process
        files.append(run.launcher)
    changed = max(map(_modified, files))
    return not run.result.exists() and time.time() - changed < RUNNING.total_seconds()


def _old_checkpoints(run: RunFolder, whole: bool, needs: Needs) -> list[Path]:
    """For a remaining run, return the checkpoints that are damaged or that no registered version needs.

    If `whole` is true, all checkpoints of the run stay.

    The last checkpoint stays, because a run without its last checkpoint does not count as finished.
    """
    if whole:
        return []
    finished = run.finished_checkpoints()
    registered = set(needs(run) or ())
    return [path for path in finished[:-1] if path.name not in registered] + run.damaged_checkpoints()


def _shards_of(file: RunFile) -> tuple[str, str]:
    return file.train_shards, file.validate_shards


def _old_shards(folder: Path, keep: int, used: Collection[str]) -> list[Path]:
    """Return the complete shard folders that are not among the newest, and that no run and no kept folder needs."""
    manifests: dict[Path, Manifest] = {}
    for path in sorted(folder.glob(f"[!.]*/{MANIFEST}")):
        try:
            manifests[path.parent] = read_manifest(path.parent)
        except LakesightError:
            continue  # keep shards that another release wrote

    def subject(path: Path) -> str:
        request = manifests[path].request.model_copy(update={"table_version": 0, "table_commit": None, "left_out": ()})
        return f"{request.model_dump_json()}{[part.source for part in manifests[path].parts]}"

    kept = {path for path in manifests if path.name in used}
    kept |= set(_newest(manifests, keep, subject, lambda path: path / MANIFEST))
    parts = {Path(file.file).parts[1] for path in kept for file in manifests[path].files if file.file.startswith("..")}
    return [path for path in manifests if path not in kept and path.name not in parts]


def _old_reports(folder: Path, keep: int) -> list[Path]:
    """Return the reports that are not among the newest reports on their subject.

    The last part of a report's name is a hash, a number or an id. All evaluations of one model version on one split are
    reports on the same subject, and so are all comparisons. Files with different suffixes are different reports: an
    ingest writes a page (.html) and its figures (.json).
    """
    found = [path for path in sorted(folder.glob("[!.]*")) if "-" in path.name]

    def subject(path: Path) -> str:
        name = "compare" if path.name.startswith("compare-") else path.name.rpartition("-")[0]
        return f"{name}{path.suffix}"

    newest = set(_newest(found, keep, subject, lambda path: path))
    return [path for path in found if path not in newest]


def _newest(items: Iterable[T], keep: int, subject: Callable[[T], str], file: Callable[[T], Path]) -> Iterator[T]:
    """For each subject, yield the `keep` items whose files were changed last."""
    groups: dict[str, list[T]] = defaultdict(list)
    for item in items:
        groups[subject(item)].append(item)
    for group in groups.values():
        yield from sorted(group, key=lambda item: _modified(file(item)))[-keep:]


def _modified(path: Path) -> float:
    """Return the modification time of a file, or 0 if another command has just removed the file."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size(path: Path) -> int:
    """Return the size of a file or of all files in a folder, without files that another command has just removed."""
    files = [Path(folder, name) for folder, _, names in os.walk(path) for name in names] if path.is_dir() else [path]
    total = 0
    for file in files:
        with suppress(FileNotFoundError):
            total += file.lstat().st_size
    return total

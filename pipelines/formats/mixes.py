"""Mixes of shard folders: the manifest of a mix, and the pictures that a mix leaves out because they are copies."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipelines.config import short_hash
from pipelines.formats.run_folder import read_json
from pipelines.formats.shards import (
    MANIFEST,
    Manifest,
    MixPart,
    ShardRequest,
    Shards,
    read_manifest,
    write_manifest,
)
from vlm.config import Config

logger = logging.getLogger(__name__)


class ShardFolder(NamedTuple):
    """A complete shard folder. `reused` is true if an earlier command has written the folder."""

    folder: Path
    manifest: Manifest
    reused: bool


class MixCopies(Config):
    """Training pictures of a mix that are copies of validation or test pictures in another source of the mix.

    Attributes:
        left_out: ids of the pictures that are copies, by name of their source.
    """

    left_out: dict[str, tuple[str, ...]]

    def leave_out(self, requests: Sequence[ShardRequest]) -> list[ShardRequest]:
        """Return the requests of a mix's sources, changed so that they leave out the copies."""
        return [request.model_copy(update={"left_out": self.left_out.get(request.source, ())}) for request in requests]


def copies_file(shards: Path, requests: Sequence[ShardRequest]) -> Path:
    """Return the path of the file that stores the copies (MixCopies) among the sources of a mix.

    The name depends on the ids of the commits that made the versions of the table. A version number is not enough,
    because a table that was restored from a copy may have another version with the same number. If the id of a commit
    is not known, only the version number is used.
    """
    compared = [
        (request.table_id, request.source, request.table_version, *filter(None, [request.table_commit]))
        for request in requests
    ]
    return shards / f"{requests[0].source}-copies-{short_hash(compared)}.json"


def known_copies(shards: Path, requests: Sequence[ShardRequest], shares: Sequence[float]) -> MixCopies | None:
    """Return the copies among the sources of a mix, or None if the sources have not been compared yet.

    Earlier releases of Lakesight did not search for copies among the sources of a mix. A mix that an earlier release
    wrote is kept unchanged, because runs that were trained on the mix would otherwise be trained again.

    Args:
        shards: parent folder of the shard folders.
        requests: shard requests of the sources, in which no picture is left out yet.
        shares: for each source except the first source, its share of the rows that an epoch draws.
    """
    file = copies_file(shards, requests)
    if file.exists():
        return read_json(file, MixCopies)
    if stored := _copies_without_commits(shards, requests):
        return stored
    parts = find_parts(shards, requests)
    if not parts or not (shards / (name := mix_name(parts, _draws(parts, shares))) / MANIFEST).exists():
        return None
    logger.warning(
        "mix %s is kept, although it was written by a release that did not search for copies among the sources", name
    )
    return MixCopies(left_out={})


def _copies_without_commits(shards: Path, requests: Sequence[ShardRequest]) -> MixCopies | None:
    """Read the copies that an earlier release stored under the version numbers alone, without the ids of the commits.

    The stored copies are used only under two conditions. First, all shard folders of the requests exist, and the stored
    copies were left out of these shards. Second, no shards were written from another commit with the same version
    number.
    """
    file = copies_file(shards, [request.model_copy(update={"table_commit": None}) for request in requests])
    if not file.exists():
        return None
    copies = read_json(file, MixCopies)
    if find_parts(shards, copies.leave_out(requests)) is None:
        return None
    return None if any(_has_other_commit(shards, request) for request in requests) else copies


def _has_other_commit(shards: Path, request: ShardRequest) -> bool:
    """Return whether a shard folder has rows of another commit with the same table version number as the request."""

    def version_of(other: ShardRequest) -> tuple[str, str, int]:
        return other.table_id, other.source, other.table_version

    written = (read_manifest(path.parent).request for path in shards.glob(f"{request.source}-*/{MANIFEST}"))
    return any(
        version_of(other) == version_of(request) and other.table_commit not in {None, request.table_commit}
        for other in written
    )


def find_parts(shards: Path, requests: Sequence[ShardRequest]) -> list[ShardFolder] | None:
    """Open the shard folders of requests, or return None if one of these folders is not complete."""
    folders = [shards / request.folder_name for request in requests]
    if not all((folder / MANIFEST).exists() for folder in folders):
        return None
    return [ShardFolder(folder, Shards.open(folder).manifest, reused=True) for folder in folders]


def mix_name(parts: Sequence[ShardFolder], draws: Sequence[int]) -> str:
    """Return the name of the folder of a mix."""
    first, names = parts[0].manifest, [part.folder.name for part in parts]
    return f"{first.request.source}-mix-{short_hash(first.format, names, list(draws))}"


def write_mix(parts: Sequence[ShardFolder], shares: Sequence[float], shards: Path) -> ShardFolder:
    """Write a folder that contains only a manifest, which refers to the files of other shard folders.

    If the same mix has been written before, its folder is reused.

    The manifest says how many rows of each source (part) an epoch draws. An epoch draws as many rows as all sources
    have together. Each source except the first source gets its share of the draws. The first source gets the remaining
    draws. Each of the `shares` is above 0, and their sum is below 1.

    Args:
        parts: shard folders with the same parent folder.
        shares: for each source except the first source, its share of the rows that an epoch draws.
        shards: parent folder of the shard folders.
    """
    draws = _draws(parts, shares)
    folder = shards / mix_name(parts, draws)
    reused = (folder / MANIFEST).exists()
    if not reused:
        manifest = Manifest(
            request=parts[0].manifest.request,
            files=tuple(
                file.model_copy(update={"file": f"../{part.folder.name}/{file.file}"})
                for part in parts
                for file in part.manifest.files
            ),
            parts=tuple(
                MixPart(source=part.manifest.request.source, rows=part.manifest.num_rows, draws=number)
                for part, number in zip(parts, draws, strict=True)
            ),
        )
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder, manifest)
    return ShardFolder(folder, Shards.open(folder).manifest, reused)


def _draws(parts: Sequence[ShardFolder], shares: Sequence[float]) -> list[int]:
    """Return the number of rows that an epoch draws from each source."""
    total = sum(part.manifest.num_rows for part in parts)
    shared_draws = [max(1, round(share * total)) for share in shares]
    return [max(1, total - sum(shared_draws)), *shared_draws]

"""Tests of mixes of shard folders: which pictures a mix leaves out, and that mixes of earlier releases are kept."""

from __future__ import annotations

from pathlib import Path

from tiny_runs import write_shards

from pipelines.formats.mixes import MixCopies, copies_file, find_parts, known_copies, write_mix
from pipelines.formats.run_folder import write_json
from pipelines.formats.shards import ShardRequest, write_manifest

SHARES = [0.25]


def write_parts(folder: Path, **changes: object) -> list[ShardRequest]:
    """Write the shards of two sources, in folders that have the names of their requests."""
    requests = []
    for size in (8, 9):
        written = write_shards(folder / "new", rows=20, rows_per_file=size)
        requests.append(written.manifest.request.model_copy(update=changes))
        write_manifest(written.folder, written.manifest.model_copy(update={"request": requests[-1]}))
        written.folder.rename(folder / requests[-1].folder_name)
    return requests


def test_pictures_are_compared_for_a_new_mix_but_not_for_a_mix_that_an_earlier_release_wrote(tmp_path: Path) -> None:
    requests = write_parts(tmp_path)
    assert known_copies(tmp_path, requests, SHARES) is None, "the sources are sharded, but not mixed"
    parts = find_parts(tmp_path, requests)
    assert parts
    mix = write_mix(parts, SHARES, tmp_path)
    kept = known_copies(tmp_path, requests, SHARES)
    assert kept == MixCopies(left_out={})
    assert find_parts(tmp_path, kept.leave_out(requests)) == parts
    assert write_mix(parts, SHARES, tmp_path) == mix._replace(reused=True)
    assert known_copies(tmp_path, requests, [0.5]) is None
    changed = [requests[0], requests[1].model_copy(update={"table_version": 1})]
    assert known_copies(tmp_path, changed, SHARES) is None


def test_the_stored_list_of_copies_of_a_mix_is_valid_until_a_source_changes_and_is_part_of_shard_names(
    tmp_path: Path,
) -> None:
    requests = write_parts(tmp_path)
    copies = MixCopies(left_out={"tiny": ("tiny/1", "tiny/2")})
    write_json(copies_file(tmp_path, requests), copies)
    assert known_copies(tmp_path, requests, SHARES) == copies
    left = copies.leave_out(requests)
    assert [request.left_out for request in left] == [("tiny/1", "tiny/2")] * 2
    assert not {request.folder_name for request in left} & {request.folder_name for request in requests}
    assert find_parts(tmp_path, left) is None
    larger = [request.model_copy(update={"rows": 100}) for request in requests]
    assert known_copies(tmp_path, larger, SHARES) == copies, "the stored list does not depend on shard settings"
    changed = [requests[0].model_copy(update={"table_version": 1}), requests[1]]
    assert known_copies(tmp_path, changed, SHARES) is None


def test_copies_are_searched_again_if_a_version_number_returns_with_another_commit(tmp_path: Path) -> None:
    requests = write_parts(tmp_path, table_commit="first")
    copies = MixCopies(left_out={"tiny": ("tiny/1",)})
    write_json(copies_file(tmp_path, requests), copies)
    assert known_copies(tmp_path, requests, SHARES) == copies
    for restored in (write_parts(tmp_path, table_commit="second"), write_parts(tmp_path, table_commit=None)):
        assert known_copies(tmp_path, restored, SHARES) is None


def test_a_list_of_copies_that_an_earlier_release_stored_is_used_only_for_the_commits_of_the_shards(
    tmp_path: Path,
) -> None:
    """In an earlier release, the name of the file with the list of copies had version numbers, but no commit ids."""
    requests = write_parts(tmp_path, table_commit="first")
    numbered = copies_file(tmp_path, [request.model_copy(update={"table_commit": None}) for request in requests])
    copies = MixCopies(left_out={})
    write_json(numbered, copies)
    assert known_copies(tmp_path, requests, SHARES) == copies
    unsharded = [request.model_copy(update={"table_commit": "second"}) for request in requests]
    assert known_copies(tmp_path, unsharded, SHARES) is None
    restored = write_parts(tmp_path, table_commit="second")
    assert known_copies(tmp_path, restored, SHARES) is None, "the list may belong to the other commit"

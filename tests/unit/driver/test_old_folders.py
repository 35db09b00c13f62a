"""Tests of the removal of old folders: which folders are removed, and that every needed folder is kept."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
from local_platforms import open_local
from run_owners import owned_by_another_process
from tiny_runs import finish_run, tiny_run, write_run, write_shards

from pipelines.driver.old_folders import Needs, OldFolder, find_old_folders, remove_folders
from pipelines.errors import UserError
from pipelines.formats.run_folder import RunFolder
from pipelines.formats.shards import Manifest, Shards, write_manifest
from pipelines.platform import Platform

LONG_AGO = 10 * 86_400


@pytest.fixture
def platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Platform:
    return open_local(monkeypatch, tmp_path / "home")


def no_versions(run: RunFolder) -> Collection[str] | None:
    return ()


def shards_of(platform: Platform, version: int, source: str = "tiny") -> Shards:
    """Write a shard folder for a version of the table. The folder of a higher version has a later time."""
    shards = write_shards(platform.folder("shards") / f"{source}-{version}", rows=2)
    request = shards.manifest.request.model_copy(update={"table_version": version, "source": source})
    write_manifest(shards.folder, Manifest(request=request, files=shards.manifest.files))
    set_age(shards.folder / "manifest.json", LONG_AGO - version)
    return Shards.open(shards.folder)


def run_of(platform: Platform, number: int, shards: Shards, *, finished: bool = True, **train: Any) -> RunFolder:
    """Write a run folder. The folder of a run with a higher number is newer."""
    run = write_run(platform.folder("runs") / f"tiny-{number}", tiny_run(**train), shards, shards)
    if finished:
        for step in (4, 8):
            run.checkpoint(step).mkdir(parents=True)
        finish_run(run)
    set_age(run.run_file, LONG_AGO - number)
    return run


def set_age(path: Path, seconds: float) -> None:
    now = path.stat().st_mtime
    os.utime(path, (now, now - seconds))


def old_names(platform: Platform, keep: int = 1, needs=no_versions) -> set[str]:  # type: ignore[no-untyped-def]
    return {
        str(folder.path.relative_to(platform.root.absolute())) for folder in find_old_folders(platform, keep, needs)
    }


def clean(
    platform: Platform,
    keep: int = 1,
    folders: Sequence[OldFolder] | None = None,
    needs: Needs = no_versions,
) -> list[OldFolder]:
    """Remove the given folders, by default all old folders, and return the removed folders."""
    found = find_old_folders(platform, keep, needs) if folders is None else folders
    return remove_folders(platform, keep, found, lambda: needs)


def test_the_newest_runs_of_each_run_name_and_their_shards_are_kept(platform: Platform) -> None:
    for number in range(4):
        run_of(platform, number, shards_of(platform, number))
    assert old_names(platform, keep=2) == {"runs/tiny-0", "runs/tiny-1", "shards/tiny-0", "shards/tiny-1"}
    before = sorted(platform.root.rglob("*"))
    folders = find_old_folders(platform, 2, no_versions)
    assert all(folder.bytes > 0 for folder in folders)
    assert sorted(platform.root.rglob("*")) == before, "the search for old folders changes nothing"
    clean(platform, 2, folders)
    assert {path.name for path in platform.folder("runs").iterdir()} == {"tiny-2", "tiny-3"}
    assert {path.name for path in platform.folder("shards").iterdir()} == {"tiny-2", "tiny-3"}
    assert old_names(platform, keep=2) == set()


def test_the_number_of_kept_folders_does_not_grow_with_the_number_of_runs(platform: Platform) -> None:
    stay = []
    for count in (range(4), range(4, 16)):
        for number in count:
            run_of(platform, number, shards_of(platform, number))
        clean(platform)
        stay.append(len(list(platform.folder("runs").iterdir())) + len(list(platform.folder("shards").iterdir())))
    assert stay == [2, 2]


def test_a_run_with_a_registered_version_keeps_its_shards_and_its_last_and_registered_checkpoints(
    platform: Platform,
) -> None:
    for number in range(2):
        run_of(platform, number, shards_of(platform, number))
    registered = {"tiny-0": ["step_000004"]}
    found = old_names(platform, needs=lambda run: registered.get(run.path.name, ()))
    assert found == {"runs/tiny-0/checkpoints/step_000008"}


def test_a_run_whose_model_versions_are_on_another_tracking_server_is_kept_completely(platform: Platform) -> None:
    for number in range(2):
        run_of(platform, number, shards_of(platform, number))
    assert old_names(platform, needs=lambda run: None) == set()


def test_a_run_is_kept_while_it_trains_or_waits_for_registration_or_is_the_start_of_another_run(
    platform: Platform,
) -> None:
    shards = shards_of(platform, 0)
    base = run_of(platform, 0, shards)
    waiting, training, failed = (
        run_of(platform, 1, shards),
        *(run_of(platform, n, shards, finished=False) for n in (2, 3)),
    )
    waiting.unregistered.touch()
    training.heartbeat(0).parent.mkdir()
    training.heartbeat(0).touch()
    run_of(platform, 9, shards, start_from=str(base.checkpoint(12)))
    assert old_names(platform) == {f"runs/{failed.path.name}"}


def test_a_shard_folder_is_kept_as_long_as_a_kept_mix_reads_it(platform: Platform) -> None:
    parts = [shards_of(platform, version, "part") for version in (1, 2)]
    old = parts[0].manifest
    files = tuple(file.model_copy(update={"file": f"../part-1/{file.file}"}) for file in old.files)
    mix = platform.folder("shards") / "tiny-mix-1"
    mix.mkdir()
    write_manifest(mix, Manifest(request=old.request.model_copy(update={"source": "tiny"}), files=files))
    assert old_names(platform) == set()
    (mix / "manifest.json").unlink()
    assert old_names(platform) == {"shards/part-1"}


def test_only_the_newest_reports_on_each_subject_are_kept(platform: Platform) -> None:
    reports = platform.folder("reports")
    reports.mkdir(parents=True)
    names = ["ingest-demo-1.html", "ingest-demo-2.html", "ingest-other-1.html", "compare-1-2.html", "compare-3-4.html"]
    names += ["ingest-demo-1.json", "ingest-demo-2.json"]  # the figures are written after the page
    for number, name in enumerate(names):
        (reports / name).write_text("page")
        os.utime(reports / name, (number, number))
    for number, name in enumerate(["tiny-1-demo-val-aa", "tiny-1-demo-val-bb", "tiny-2-demo-val-cc"]):
        (reports / name).mkdir()
        os.utime(reports / name, (number, number))
    expected = {"ingest-demo-1.html", "ingest-demo-1.json", "compare-1-2.html", "tiny-1-demo-val-aa"}
    assert old_names(platform) == {f"reports/{name}" for name in expected}


def test_folders_of_other_programs_and_unreadable_folders_are_kept(platform: Platform) -> None:
    for kind in ("runs", "shards"):
        (platform.folder(kind) / "notes").mkdir(parents=True)
        (platform.folder(kind) / "notes" / "run.json").write_text("{}")
        (platform.folder(kind) / "notes" / "manifest.json").write_text("{}")
    assert old_names(platform) == set()
    with pytest.raises(UserError, match="at least one folder"):
        find_old_folders(platform, 0, no_versions)


def test_a_folder_whose_removal_was_interrupted_is_removed_by_the_next_cleanup(platform: Platform) -> None:
    run = run_of(platform, 1, shards_of(platform, 1))
    run.path.rename(run.path.with_name(".removed-tiny-1"))
    assert old_names(platform) == {"runs/.removed-tiny-1"}
    clean(platform)
    assert list(platform.folder("runs").iterdir()) == []


def test_an_unfinished_run_whose_files_have_times_in_the_future_is_kept(platform: Platform) -> None:
    shards = shards_of(platform, 0)
    run_of(platform, 9, shards)
    ahead = run_of(platform, 1, shards, finished=False)
    assert old_names(platform) == {"runs/tiny-1"}
    set_age(ahead.run_file, -2 * LONG_AGO)  # the clock of the host that wrote the file was ahead
    run_of(platform, 10, shards, finished=False)
    set_age(platform.folder("runs") / "tiny-10" / "run.json", -3 * LONG_AGO)
    assert old_names(platform) == {"runs/tiny-9"}


def test_folders_that_another_command_has_just_removed_are_skipped(platform: Platform) -> None:
    shards = shards_of(platform, 0)
    for number in range(4):
        run_of(platform, number, shards, finished=False)
    found = find_old_folders(platform, 1, no_versions)
    assert clean(platform, 1, found[:1]) == found[:1]
    assert clean(platform, 1, found) == found[1:]
    assert {path.name for path in platform.folder("runs").iterdir()} == {"tiny-3"}


def test_folders_that_another_command_has_begun_to_use_since_they_were_listed_are_kept(platform: Platform) -> None:
    shards = [shards_of(platform, version) for version in range(4)]
    resumed = run_of(platform, 0, shards[0], finished=False)
    owned, registered, started, unused = (run_of(platform, number, shards[0]) for number in (1, 2, 3, 4))
    run_of(platform, 9, shards[3])
    listed = find_old_folders(platform, 1, no_versions)
    assert len(listed) == 5 + 3, "five runs, and the shards of versions 0, 1 and 2"

    resumed.heartbeat(0).parent.mkdir()
    resumed.heartbeat(0).touch()
    new = run_of(platform, 10, shards[1], start_from=str(started.checkpoint(12)))
    with owned_by_another_process(owned):
        removed = clean(platform, 1, listed, lambda run: ["step_000004"] if run == registered else ())
    assert {folder.path.name for folder in removed} == {unused.path.name, shards[2].folder.name}
    left = set(platform.folder("runs").iterdir())
    assert left >= {run.path for run in (resumed, owned, registered, started, new)}
    assert registered.checkpoint(8).is_dir()


def test_a_checkpoint_is_kept_if_it_was_registered_or_its_run_waits_for_registration_since_it_was_listed(
    platform: Platform,
) -> None:
    run, _ = (run_of(platform, number, shards_of(platform, number)) for number in range(2))
    listed = find_old_folders(platform, 1, lambda _: ["step_000012"])
    assert {folder.path.name for folder in listed} == {"step_000004", "step_000008"}
    [removed] = clean(platform, 1, listed, lambda _: ["step_000008", "step_000012"])
    assert removed.path == run.checkpoint(4).absolute()
    run.unregistered.touch()
    assert clean(platform, 1, listed, lambda _: ["step_000012"]) == []
    assert run.checkpoint(8).is_dir()

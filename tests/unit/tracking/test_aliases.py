"""Tests of alias moves that are interrupted at any moment: aliases stay valid and the next run completes the move."""

from __future__ import annotations

import multiprocessing
import os
import random
import sqlite3
import time
from contextlib import closing, suppress
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, Literal

import pytest
from local_platforms import open_local
from mlflow import MlflowClient

from pipelines.config import LocalPlatformConfig
from pipelines.errors import UserError
from pipelines.platform import Platform, local
from pipelines.tracking import aliases, registry
from pipelines.tracking.server import connect

NAME = "m"
Kind = Literal["promote", "rollback"]
BEFORE = {"champion": "2", "previous": "1"}
AFTER = {"promote": {"champion": "3", "previous": "2"}, "rollback": {"champion": "1", "previous": "2"}}
WRITES = ("set_registered_model_tag", "set_registered_model_alias", "delete_registered_model_tag")


@pytest.fixture(scope="module")
def three_versions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a registry with three versions of a model, and return the path of the registry's SQLite file."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    uri = f"sqlite:///{path}"
    client = MlflowClient(uri, registry_uri=uri)  # an earlier test may have set the registry of this process
    client.create_registered_model(NAME)
    for number in range(3):
        client.create_model_version(NAME, f"file:///{number}")
    return path


@pytest.fixture
def laptop(tmp_path: Path, three_versions: Path, monkeypatch: pytest.MonkeyPatch) -> Platform:
    return open_local(monkeypatch, tmp_path / "home", database=three_versions)


def reset(platform: Platform) -> None:
    client = connect(platform)
    for alias, number in BEFORE.items():
        client.set_registered_model_alias(NAME, alias, number)
    client.set_registered_model_alias(NAME, "challenger", "3")


def move(platform: Platform, kind: Kind) -> None:
    if kind == "promote":
        aliases.promote(platform, registry.resolve(platform, NAME, "3"))
    elif (planned := aliases.plan_rollback(platform, NAME)) is not None:
        aliases.move_aliases(platform, NAME, planned)


def state(platform: Platform) -> tuple[dict[str, str], bool]:
    """Return the aliases `champion` and `previous` with their versions, and whether a move is recorded."""
    model = connect(platform).get_registered_model(NAME)
    found = {alias: str(number) for alias, number in model.aliases.items()}
    return {alias: found[alias] for alias in BEFORE}, aliases.MOVE_TAG in model.tags


def check_and_complete(platform: Platform, kind: Kind) -> None:
    """Assert that a kill left one of three valid states, and that running the move again completes the move."""
    found, recorded = state(platform)
    assert found in (BEFORE, BEFORE | {"champion": AFTER[kind]["champion"]}, AFTER[kind])
    if found != AFTER[kind] or recorded:  # repeating a completed rollback would undo the rollback
        move(platform, kind)
    assert state(platform) == (AFTER[kind], False)


class Killed(BaseException):
    """Exception that stands for the sudden end of the process."""


class KilledClient:
    """Client that raises Killed instead of executing write number `last`, counted from 0."""

    def __init__(self, client: MlflowClient, last: int) -> None:
        self._client, self._left = client, last

    def __getattr__(self, name: str) -> Any:
        if name in WRITES:
            if self._left == 0:
                raise Killed
            self._left -= 1
        return getattr(self._client, name)


def move_and_kill(platform: Platform, kind: Kind, last: int) -> bool:
    """Run a move that is killed before write number `last`. Return whether the move was killed before its end."""
    with pytest.MonkeyPatch.context() as patch:
        client = KilledClient(connect(platform), last)
        patch.setattr(aliases, "connect", lambda _: client)
        try:
            move(platform, kind)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("kind", ["promote", "rollback"])
def test_an_alias_move_that_was_killed_between_any_two_of_its_writes_is_completed_by_the_next_run(
    laptop: Platform, kind: Kind
) -> None:
    kills = 0
    for last in range(6):
        reset(laptop)
        kills += move_and_kill(laptop, kind, last)
        check_and_complete(laptop, kind)
    assert 4 <= kills < 6


def test_an_interrupted_promotion_can_be_rolled_back(laptop: Platform) -> None:
    reset(laptop)
    assert move_and_kill(laptop, "promote", 2)
    assert state(laptop) == ({"champion": "3", "previous": "1"}, True)
    move(laptop, "rollback")
    assert state(laptop) == ({"champion": "2", "previous": "3"}, False)


def test_a_repeated_rollback_is_not_undone_although_another_command_has_completed_the_killed_rollback(
    laptop: Platform,
) -> None:
    reset(laptop)
    assert move_and_kill(laptop, "rollback", 2)
    champion = aliases.find_champion(laptop, NAME)  # as the scheduled `promote` does
    assert champion is not None
    assert champion.version == "1"
    move(laptop, "rollback")
    assert state(laptop) == (AFTER["rollback"], False)
    move(laptop, "rollback")  # somebody started this second rollback on purpose
    assert state(laptop) == ({"champion": "2", "previous": "1"}, False)


def test_a_promotion_after_a_completed_rollback_can_be_rolled_back(laptop: Platform) -> None:
    reset(laptop)
    assert move_and_kill(laptop, "rollback", 2)
    aliases.promote(laptop, registry.resolve(laptop, NAME, "3"))
    aliases.promote(laptop, registry.resolve(laptop, NAME, "1"))
    move(laptop, "rollback")
    assert state(laptop) == ({"champion": "3", "previous": "1"}, False)


def test_an_alias_move_that_was_recorded_but_not_started_is_discarded(laptop: Platform) -> None:
    reset(laptop)
    assert move_and_kill(laptop, "promote", 1)
    assert state(laptop) == (BEFORE, True)
    champion = aliases.find_champion(laptop, NAME)
    assert champion is not None
    assert champion.version == "2"
    assert state(laptop) == (BEFORE, False)


# ------------------------------------------------------------------------------------------------ real kills


def move_in_child(root: str, kind: Kind, ready: Event, go: Event) -> None:
    os.environ["LAKESIGHT_HOME"] = root
    platform = local(LocalPlatformConfig())
    state(platform)  # this call loads everything that the first request needs
    ready.set()
    go.wait()
    move(platform, kind)


def kill_at_random_moments(platform: Platform, kind: Kind, kills: int) -> None:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["pipelines.tracking.aliases"])
    rng = random.Random(kills)
    reset(platform)
    started = time.monotonic()
    move(platform, kind)
    longest = time.monotonic() - started
    for _ in range(kills):
        reset(platform)
        ready, go = processes.Event(), processes.Event()
        child = processes.Process(target=move_in_child, args=(str(platform.root), kind, ready, go))
        child.start()
        assert ready.wait(120)
        go.set()
        time.sleep(rng.uniform(0, longest))
        with suppress(ProcessLookupError):  # the process has already ended
            child.kill()
        child.join()
        check_and_complete(platform, kind)


@pytest.mark.faults
@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["promote", "rollback"])
def test_aliases_are_consistent_after_many_kills_at_random_moments(laptop: Platform, kind: Kind) -> None:
    kill_at_random_moments(laptop, kind, 10)


def test_digits_always_name_the_version_of_this_number_even_if_an_alias_has_the_same_digits(laptop: Platform) -> None:
    client = connect(laptop)
    client.set_registered_model_alias(NAME, "2", "1")
    client.set_registered_model_alias(NAME, "9", "1")
    assert registry.resolve(laptop, NAME, "2").version == "2"
    with pytest.raises(UserError, match="no version or alias '9'"):
        registry.resolve(laptop, NAME, "9")


def test_a_champion_that_was_deleted_from_the_registry_blocks_no_promotion(laptop: Platform) -> None:
    client = connect(laptop)
    reset(laptop)
    client.create_model_version(NAME, "file:///4")
    client.delete_model_version(NAME, "2")
    with closing(sqlite3.connect(laptop.root / "mlflow.db")) as store, store:
        # The servers of some releases of MLflow keep the alias of a deleted version.
        store.execute(
            "INSERT OR REPLACE INTO registered_model_aliases (name, alias, version) VALUES ('m', 'champion', 2)"
        )
    assert aliases.find_champion(laptop, NAME) is None
    aliases.promote(laptop, registry.resolve(laptop, NAME, "4"))
    champion = aliases.find_champion(laptop, NAME)
    assert champion is not None
    assert champion.version == "4"

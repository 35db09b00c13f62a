"""Functions that move the aliases `champion`, `previous` and `challenger` of a registered model.

The alias `champion` points to the version that generates captions. The alias `previous` points to the champion before
the present champion. The alias `challenger` points to the version that was last submitted for promotion. The alias is
removed when that version becomes the champion.

A promotion moves two aliases, but a registry cannot move both aliases in one transaction. A tag of the registered model
therefore records the move before the move starts, and the tag is deleted when both aliases are set. A process that
finds the tag of an interrupted move completes the move if `champion` has moved already. If `champion` has not moved
yet, the process cancels the move. A process that completes a rollback in this way sets a second tag, so that a repeated
`rollback` command does not exchange the aliases once more. The repeated command or the next move deletes the second
tag.
"""

from __future__ import annotations

import logging
from typing import Literal

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipelines.errors import UserError
from pipelines.platform import Platform
from pipelines.tracking.registry import (
    CHAMPION,
    ModelVersion,
    read_aliases,
    read_version,
    registry_errors,
    version_label,
)
from pipelines.tracking.server import connect
from vlm.config import Config
from vlm.errors.printable import hide_secrets

logger = logging.getLogger(__name__)

PREVIOUS, CHALLENGER = "previous", "challenger"
MOVE_TAG = "lakesight_move"
COMPLETED_TAG = "lakesight_completed_rollback"
"""Name of the tag that a registered model has if a rollback was killed and another command has completed the rollback.
The tag stores the champion of the rollback."""


class AliasMove(Config):
    """Target versions of the aliases `champion` and `previous`, stored as JSON in a tag while the aliases move."""

    kind: Literal["promote", "rollback"]
    champion: str
    previous: str | None


def find_champion(platform: Platform, name: str) -> ModelVersion | None:
    """Complete or cancel an interrupted alias move, then return the champion, or None if there is no champion."""
    client = connect(platform)
    with registry_errors(platform, f"model {name}"):
        _finish_interrupted_move(client, platform, name)
        return _read_champion(client, platform, name)


def find_settled_champion(platform: Platform, name: str) -> ModelVersion | None:
    """Return the champion, or None if there is no champion, or if a move of the aliases is running or was interrupted.

    Unlike `find_champion`, this function changes nothing, because it cannot know whether the command that has recorded
    the move still runs.
    """
    client = connect(platform)
    with registry_errors(platform, f"model {name}"):
        if MOVE_TAG in client.get_registered_model(name).tags:
            return None
        return _read_champion(client, platform, name)


def promote(platform: Platform, version: ModelVersion) -> ModelVersion:
    """Point `champion` to a version and `previous` to the old champion.

    If the version is already the champion, nothing changes. The caller must check the conditions of promotion before
    this call (`jobs.promote.check_gate`).
    """
    client = connect(platform)
    with registry_errors(platform, version_label(version)):
        _finish_interrupted_move(client, platform, version.name)
        champion = _read_champion(client, platform, version.name)
        old = None if champion is None else champion.version
        if old != version.version:
            _move(client, version.name, AliasMove(kind="promote", champion=version.version, previous=old))
        return read_version(client, version.name, version.version)


def plan_rollback(platform: Platform, name: str) -> AliasMove | None:
    """Return the move that swaps `champion` and `previous`.

    Return None if an interrupted rollback was completed by this call, or by another command after the kill. Another
    swap would undo the rollback.

    Raises:
        UserError: the model has no previous champion.
    """
    client = connect(platform)
    with registry_errors(platform, f"model {name}"):
        _finish_interrupted_move(client, platform, name)
        aliases = read_aliases(platform, client, name)
        completed = client.get_registered_model(name).tags.get(COMPLETED_TAG)
        if completed is not None:
            client.delete_registered_model_tag(name, COMPLETED_TAG)
            if completed == aliases.get(CHAMPION):
                logger.warning(
                    "an earlier rollback to version %s was interrupted, and is now completed; nothing else is moved",
                    completed,
                )
                return None
    if not {CHAMPION, PREVIOUS} <= aliases.keys():
        raise UserError(
            f"model {name} has no previous champion to roll back to",
            where=hide_secrets(platform.registry_uri),
            got=", ".join(f"{alias} = {version}" for alias, version in sorted(aliases.items())) or "no aliases",
            fix="promote a second version of the model before you roll back",
        )
    return AliasMove(kind="rollback", champion=aliases[PREVIOUS], previous=aliases[CHAMPION])


def move_aliases(platform: Platform, name: str, move: AliasMove) -> None:
    """Move the aliases `champion` and `previous` as `plan_rollback` has planned."""
    client = connect(platform)
    with registry_errors(platform, f"model {name}"):
        _move(client, name, move)


def _move(client: MlflowClient, name: str, move: AliasMove) -> None:
    """Record a move in a tag, then move the aliases and delete the tag."""
    client.set_registered_model_tag(name, MOVE_TAG, move.model_dump_json())
    if COMPLETED_TAG in client.get_registered_model(name).tags:
        client.delete_registered_model_tag(name, COMPLETED_TAG)
    client.set_registered_model_alias(name, CHAMPION, move.champion)
    _finish_move(client, name, move)


def _finish_move(client: MlflowClient, name: str, move: AliasMove) -> None:
    """Complete a move whose alias `champion` has moved already. This function is idempotent."""
    if move.previous is not None:
        client.set_registered_model_alias(name, PREVIOUS, move.previous)
    if str(client.get_registered_model(name).aliases.get(CHALLENGER)) == move.champion:
        client.delete_registered_model_alias(name, CHALLENGER)
    client.delete_registered_model_tag(name, MOVE_TAG)


def _finish_interrupted_move(client: MlflowClient, platform: Platform, name: str) -> None:
    """If the alias `champion` has moved already, complete the interrupted move. If `champion` has not moved yet, cancel
    the move. If the completed move is a rollback, set the tag COMPLETED_TAG.
    """
    aliases = read_aliases(platform, client, name)
    recorded = client.get_registered_model(name).tags.get(MOVE_TAG)
    if recorded is None:
        return
    move = AliasMove.model_validate_json(recorded)
    if aliases.get(CHAMPION) != move.champion:
        client.delete_registered_model_tag(name, MOVE_TAG)
        return
    logger.info("completing an interrupted %s of model %s", move.kind, name)
    if move.kind == "rollback":
        client.set_registered_model_tag(name, COMPLETED_TAG, move.champion)
    _finish_move(client, name, move)


def _read_champion(client: MlflowClient, platform: Platform, name: str) -> ModelVersion | None:
    """Return the champion, or None if there is no champion or its version was deleted.

    Some releases of MLflow's server keep the alias of a deleted version.
    """
    number = read_aliases(platform, client, name).get(CHAMPION)
    if number is None:
        return None
    try:
        return read_version(client, name, number)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    logger.warning("the champion of model %s, version %s, was deleted from the registry", name, number)
    return None

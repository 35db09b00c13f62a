"""Several writers of one Delta table: whoever meets another's commit half-way has written nothing, and tries again."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from delta.exceptions import (
    ConcurrentAppendException,
    ConcurrentDeleteDeleteException,
    ConcurrentDeleteReadException,
    ConcurrentTransactionException,
    ConcurrentWriteException,
    MetadataChangedException,
    ProtocolChangedException,
)

from pipelines.errors import StageFailed

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class Overtaken(Exception):
    """Another writer committed after this one had made its plan; nothing was written."""


CONFLICTS = (
    Overtaken,
    ConcurrentAppendException,
    ConcurrentDeleteDeleteException,
    ConcurrentDeleteReadException,
    ConcurrentTransactionException,
    ConcurrentWriteException,
    MetadataChangedException,
    ProtocolChangedException,
)
"""Another writer was faster; nothing was written. Delta gives them no common class."""
TRIES = 12


def undisturbed(act: Callable[[], Result], where: str = "the tables it writes") -> Result:
    """What `act` returns once no other writer comes between.

    Args:
        act: writes, all or nothing.
        where: the table.

    Raises:
        StageFailed: others were faster time and again.
    """
    for number in range(1, TRIES):
        try:
            return act()
        except CONFLICTS as conflict:
            logger.info("another writer was faster (%s): try %d of %d", type(conflict).__name__, number + 1, TRIES)
            time.sleep(random.uniform(0, 0.5 * number))  # noqa: S311 (it parts those that met)
    try:
        return act()
    except CONFLICTS as conflict:
        raise StageFailed(
            f"other writers were faster {TRIES} times",
            where=where,
            got=f"{type(conflict).__name__}: {conflict}"[:500],
            fix="run it again when fewer of them run at the same time: what is there is not doubled",
        ) from conflict

"""Retry of Delta writes that lose a race to another writer (optimistic concurrency)."""

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


class WriteConflict(Exception):
    """Another writer committed after this one planned its write. Nothing was written."""


CONFLICTS = (
    WriteConflict,
    ConcurrentAppendException,
    ConcurrentDeleteDeleteException,
    ConcurrentDeleteReadException,
    ConcurrentTransactionException,
    ConcurrentWriteException,
    MetadataChangedException,
    ProtocolChangedException,
)
"""Errors after which nothing was written because another writer committed first. Delta gives them no common class."""
MAX_ATTEMPTS = 12


def retry_on_conflict(write: Callable[[], Result], where: str = "the tables it writes") -> Result:
    """Call `write` until it does not conflict with another writer, at most MAX_ATTEMPTS times. Return its result.

    Args:
        write: writes everything in one commit, or nothing.
        where: the table, for the error message.

    Raises:
        StageFailed: every attempt conflicted.
    """
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return write()
        except CONFLICTS as error:
            conflict = error
            logger.info("write conflict (%s), attempt %d of %d", type(error).__name__, attempt, MAX_ATTEMPTS)
            if attempt < MAX_ATTEMPTS:
                time.sleep(random.uniform(0, 0.5 * attempt))  # noqa: S311 (jitter, so that writers do not meet again)
    raise StageFailed(
        f"the write conflicted with other writers {MAX_ATTEMPTS} times",
        where=where,
        got=f"{type(conflict).__name__}: {conflict}"[:500],
        fix="run it again when fewer writers run at the same time: finished work is kept and no row is duplicated",
    ) from conflict

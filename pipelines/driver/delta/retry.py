"""Retry of Delta writes that fail because another writer committed first (optimistic concurrency)."""

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
    """A write was cancelled, because another writer has committed since the write was planned. Nothing was written."""


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
"""Errors of a write that wrote nothing because another writer committed first: our own WriteConflict, and Delta's
errors. The tuple lists each exception class, because the classes have no common base class.
"""
MAX_ATTEMPTS = 12


def retry_on_conflict(write: Callable[[], Result], where: str = "the tables it writes") -> Result:
    """Call `write` until no other writer conflicts with the call, at most MAX_ATTEMPTS times. Return the result.

    Args:
        write: function that writes everything in one commit, or nothing.
        where: name of the written table, for the error message.

    Raises:
        StageFailed: every call of `write` conflicted with another writer.
    """
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return write()
        except CONFLICTS as error:
            conflict = error
            logger.info(
                "a write to a Delta table conflicted with another writer (%s), attempt %d of %d",
                type(error).__name__,
                attempt,
                MAX_ATTEMPTS,
            )
            if attempt < MAX_ATTEMPTS:
                time.sleep(random.uniform(0, 0.5 * attempt))  # noqa: S311 (a random wait keeps writers apart)
    raise StageFailed(
        f"a write to a Delta table conflicted with other writers {MAX_ATTEMPTS} times",
        where=where,
        got=f"{type(conflict).__name__}: {conflict}"[:500],
        fix="run the command again when fewer jobs write to the table: finished work is kept, no row is duplicated",
    ) from conflict

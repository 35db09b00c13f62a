"""Start of ranks without a driver. No rank changes a file of the run before rank 0 owns the run.

The ranks connect to the store of torchrun. If rank 0 owns the run, rank 0 writes OWNED into the store, else REFUSED.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from pipelines.errors import UserError
from pipelines.formats.run_folder import RunFolder
from pipelines.formats.run_owner import own_run
from pipelines.worker.rank.env import RankEnv

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

START_SECONDS = 600.0
"""Longest time that a rank waits for the store and for rank 0, in seconds."""
OWNED, REFUSED = "owned", "refused"


@contextmanager
def own_run_as_group(run: RunFolder, env: RankEnv) -> Iterator[None]:
    """Let rank 0 own a run folder while the block executes. All other ranks enter the block when rank 0 owns the run.

    Every rank of the run must call this function.

    Raises:
        SystemExit: another process owns the run, or rank 0 has ended or did not answer within START_SECONDS. This rank
            has changed no file of the run.
        StageFailed: another process has taken over the run while the block was executing.
        RuntimeError: the store of torchrun cannot be reached.
    """
    store = _open_store(env) if env.world_size > 1 else None
    # torchrun may restart all ranks with the same store, so each attempt needs its own key.
    key = f"lakesight/owner/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if env.rank and store:
        if _wait_for_rank_0(store, key) != OWNED:
            sys.exit(f"rank {env.rank} ends, because rank 0 does not own the run {run.path}")
        yield
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(own_run(run))
        except UserError as error:
            if store:
                store.set(key, REFUSED)
            sys.exit(str(error))
        if store:
            store.set(key, OWNED)
        yield


def _open_store(env: RankEnv) -> Store:
    """Connect to the store of torchrun. With another launcher, rank 0 opens the store in its own process.

    The process group later connects to the same store, so the caller must keep the store open.
    """
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(
        rendezvous("env://", rank=env.rank, world_size=env.world_size, timeout=timedelta(seconds=START_SECONDS))
    )
    return store


def _wait_for_rank_0(store: Store, key: str) -> str:
    """Wait until rank 0 has written OWNED or REFUSED into the store, and return this value.

    Return REFUSED after START_SECONDS, or if rank 0 or the store has ended.
    """
    try:
        return store.get(key).decode()
    except RuntimeError:
        return REFUSED

"""Functions that open and check the process group of all ranks, and assign a device and CPU cores to each rank."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed import FileStore  # type: ignore[attr-defined]

from pipelines.config import DatabricksPlatformConfig, PlatformConfig
from pipelines.errors import UserError
from pipelines.formats.run_folder import RunFolder
from pipelines.worker.rank.env import RankEnv

log = logging.getLogger(__name__)


def pick_device(platform: PlatformConfig, env: RankEnv) -> torch.device:
    """Choose the rank's GPU if the host has a GPU for each of its ranks, else the CPU.

    Raises:
        UserError: the platform requires GPUs, and the host has too few GPUs.
    """
    if torch.cuda.device_count() >= env.local_world_size:
        torch.cuda.set_device(env.local_rank)
        return torch.device("cuda", env.local_rank)
    if isinstance(platform, DatabricksPlatformConfig) and platform.use_gpu:
        raise UserError(
            "this host has fewer GPUs than ranks",
            where=f"host {socket.gethostname()}",
            got=f"{torch.cuda.device_count()} GPUs for {env.local_world_size} ranks",
            fix="run on a GPU cluster, or set platform.use_gpu=false",
        )
    if torch.cuda.device_count():
        log.warning(
            "this rank uses a CPU, because %d ranks need one GPU each, and host %s has only %d",
            *(env.local_world_size, socket.gethostname(), torch.cuda.device_count()),
        )
    return torch.device("cpu")


GRACE_SECONDS = 30
"""Seconds by which the timeout of a collective is longer than `train.timeout_seconds`.

The monitor of a rank must time out before the collective, because the monitor can tell which rank is at fault.
"""


@contextmanager
def process_group(env: RankEnv, device: torch.device, timeout_seconds: int) -> Iterator[None]:
    """Open the process group of all ranks, and destroy it after a normal exit.

    Ranks that the driver starts on its own host connect through a file store, which needs no port. Ranks that torchrun
    starts connect through torchrun's TCP store.

    After an error, the process group is not destroyed, because destroying the group would wait for failed ranks.
    """
    on_gpu = device.type == "cuda"
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=FileStore(env.store, env.world_size) if env.store else None,
        rank=env.rank,
        world_size=env.world_size,
        timeout=timedelta(seconds=timeout_seconds + GRACE_SECONDS),
        device_id=device if on_gpu else None,
    )
    yield
    distributed.destroy_process_group()


def check_group(run: RunFolder, device: torch.device) -> int:
    """Check that all ranks belong to the same run, and return the number of ranks on this host.

    Two runs on one host may choose the same port or rendezvous name, so a process group could mix ranks of two runs.

    Args:
        run: run folder with which this rank was started.
        device: device on which tensors for collectives are created.

    Raises:
        UserError: the process group contains a rank of another run.
    """
    local = torch.tensor([_digest(socket.gethostname()), _digest(run.run_file.read_text("utf-8"))], device=device)
    gathered = [torch.empty_like(local) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, local)
    hosts, identities = torch.stack(gathered).T.tolist()
    if len(set(identities)) > 1:
        raise UserError(
            "the ranks read different run folders",
            where=str(run.path),
            got=f"{len(set(identities))} different run.json files among {len(identities)} ranks",
            fix="make the same run folder visible to all ranks, then start the run again",
        )
    return hosts.count(hosts[distributed.get_rank()])


def divide_cores(ranks_on_host: int) -> None:
    """Let torch in this rank use an equal share of the host's CPU cores.

    By default, torchrun limits each rank to one thread.

    Args:
        ranks_on_host: number of ranks that run on this host.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // ranks_on_host))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

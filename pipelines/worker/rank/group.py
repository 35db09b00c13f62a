"""The ranks of a run as a group: what they run on, how they find each other, how they share a host."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

from pipelines.config import DatabricksPlatformConfig, PlatformConfig
from pipelines.errors import UserError
from pipelines.formats.run_folder import RunDir
from pipelines.worker.rank.env import Place


def pick_device(platform: PlatformConfig, place: Place) -> torch.device:
    """A GPU a rank where this host has that many, else the CPU for all.

    Raises:
        UserError: the platform promises GPUs and there are too few.
    """
    if torch.cuda.device_count() >= place.local_world_size:
        torch.cuda.set_device(place.local_rank)
        return torch.device("cuda", place.local_rank)
    if isinstance(platform, DatabricksPlatformConfig) and platform.use_gpu:
        raise UserError(
            "a rank has no GPU",
            where=f"host {socket.gethostname()}",
            got=f"{torch.cuda.device_count()} GPUs for {place.local_world_size} ranks",
            fix="run on a GPU cluster, or set platform.use_gpu=false",
        )
    return torch.device("cpu")


GRACE_SECONDS = 30
"""What a collective waits longer than the watch over the rank, which knows more about who is to blame."""


@contextmanager
def process_group(device: torch.device, timeout_seconds: int) -> Iterator[None]:
    """The group of all ranks. After an error it is left as it is: taking it down waits for ranks that are gone."""
    on_gpu = device.type == "cuda"
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        timeout=timedelta(seconds=timeout_seconds + GRACE_SECONDS),
        device_id=device if on_gpu else None,
    )
    yield
    distributed.destroy_process_group()


def meet(run: RunDir, device: torch.device) -> None:
    """Make sure that all ranks are of one run, and share the host's cores fairly.

    Launchers pick ports and rendezvous names that two runs on one host may have in common; and torchrun allows a rank
    one thread, whatever the host has.

    Args:
        run: the run folder as this rank sees it.
        device: where collectives take place.

    Raises:
        UserError: a rank of another run is in the group.
    """
    own = torch.tensor([_digest(socket.gethostname()), _digest(run.run.read_text("utf-8"))], device=device)
    gathered = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, own)
    hosts, identities = torch.stack(gathered).T.tolist()
    if len(set(identities)) > 1:
        raise UserError(
            "the ranks are not of one run",
            where=str(run.path),
            got=f"{len(set(identities))} different run.json files among {len(identities)} ranks",
            fix="all ranks must see the same run folder; start the run again",
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // hosts.count(hosts[distributed.get_rank()])))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

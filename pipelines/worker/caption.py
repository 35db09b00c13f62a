"""Functions that load the captioning model of a process, and limit torch to the process's share of the CPU cores."""

from __future__ import annotations

import functools

import torch

import vlm
from vlm.captioner import Captioner
from vlm.config import Precision


@functools.lru_cache(maxsize=1)
def load_captioner(folder: str, precision: Precision = Precision.FP32) -> Captioner:
    """Load the model in a folder, on a GPU if the host has a GPU. The process keeps the loaded model in a cache.

    Raises:
        CheckpointError: the folder does not contain a model.
        UserError: the precision needs a library that is not installed.
    """
    return vlm.load(folder, precision=precision)


def limit_threads(threads: int) -> None:
    """Limit torch to a number of threads, because other processes on the host also run models."""
    torch.set_num_threads(threads)

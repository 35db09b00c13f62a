"""Functions that load the captioning model of a process, and limit the process to its share of the cores."""

from __future__ import annotations

import functools

import torch

import vlm
from vlm.captioner import Captioner
from vlm.config import Precision


@functools.lru_cache(maxsize=1)
def load_captioner(folder: str, precision: Precision = Precision.FP32) -> Captioner:
    """Load the model of a folder, on a GPU if there is one. The process keeps the loaded model in a cache.

    Raises:
        CheckpointError: the folder does not contain a model.
        UserError: the precision needs a library that is not installed.
    """
    return vlm.load(folder, precision=precision)


def limit_threads(threads: int) -> None:
    """Limit torch to the cores assigned to this process, because other processes of the host run models too."""
    torch.set_num_threads(threads)

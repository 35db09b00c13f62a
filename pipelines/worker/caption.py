"""The captioner of a process: one model, loaded once, on the cores or the GPU that the process was given."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from vlm.captioner import Captioner
from vlm.checkpoint import load_model
from vlm.config import Precision
from vlm.precision import set_precision


@functools.lru_cache(maxsize=1)
def load_captioner(folder: str, precision: Precision = Precision.FP32) -> Captioner:
    """The model of a folder, on the GPU where there is one; loaded once a process.

    Raises:
        CheckpointError: the folder does not hold a model.
        UserError: the precision needs a library that is not installed.
    """
    model, tokenizer = load_model(Path(folder), "cuda" if torch.cuda.is_available() else "cpu")
    set_precision(model, precision)
    return Captioner(model, tokenizer)


def limit_threads(threads: int) -> None:
    """Keep torch to the cores that this process was given: its neighbours on the machine have models of their own."""
    torch.set_num_threads(threads)

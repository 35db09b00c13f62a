"""Functions that load the captioning model of a process, and limit torch to the process's share of the CPU cores.

On a CPU, weights that need no conversion stay in a memory-mapped file. All processes of a host that load the same file
therefore share one copy of the weights in memory. On a GPU, each process has its own copy of the weights in GPU memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib.metadata
from pathlib import Path

import torch

import vlm
from vlm.captioner import Captioner
from vlm.checkpoint import best_device, find_checkpoint, load_model, map_model, save_converted, stored_precision
from vlm.config import Precision
from vlm.precision import set_precision


@functools.lru_cache(maxsize=1)
def load_captioner(folder: str, precision: Precision = Precision.FP32) -> Captioner:
    """Load the model in a folder, on a GPU if the host has a GPU. The process keeps the last loaded model in memory.

    On a CPU, the weights are mapped from the file if `needs_conversion` is false. If the weights need a conversion, the
    converted weights are in the memory of this process alone.

    Raises:
        CheckpointError: the folder does not contain a model.
        UserError: the precision needs a library that is not installed.
    """
    path = find_checkpoint(Path(folder))
    if best_device().type == "cpu" and not needs_conversion(path, precision):
        return Captioner(*map_model(path, precision))
    return vlm.load(path, precision=precision)


def needs_conversion(folder: Path, precision: Precision) -> bool:
    """Return True if this host computes on a CPU, and the weights in a checkpoint folder do not have the precision yet.

    Raises:
        CheckpointError: the weights cannot be read.
    """
    return best_device().type == "cpu" and stored_precision(folder) is not precision


def conversion_key(precision: Precision) -> list[str]:
    """Return everything that determines the bytes of a converted model, except the model itself.

    The layout of int4 weights depends on torchao and on the instructions of the CPU.
    """
    libraries = ["torch", "torchao"] if precision.quantized else ["torch"]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in libraries]
    return [str(precision), torch.backends.cpu.get_cpu_capability(), *versions]


def convert_model(source: Path, target: Path, precision: Precision) -> None:
    """Write a checkpoint whose weights are converted to a precision, for `load_captioner`.

    Raises:
        CheckpointError: the folder `source` does not contain a model.
        UserError: the precision needs a library that is not installed.
    """
    _write_converted(source, target, precision)
    gc.collect()  # torchao's layers refer to themselves, so only the garbage collector frees the weights
    _return_freed_memory()


def _write_converted(source: Path, target: Path, precision: Precision) -> None:
    # A mapped model needs memory only for the converted weights, and not for the weights of the file.
    load = map_model if stored_precision(source) is Precision.FP32 else load_model
    model, tokenizer = load(source)
    set_precision(model, precision)
    save_converted(target, model, tokenizer, precision)


def _return_freed_memory() -> None:
    """Return freed memory to the system, if the C library of this system has the function `malloc_trim` (glibc).

    A conversion to int8 frees many tensors, and glibc would keep their memory for this process: 0.9 GB after the
    conversion of a model of 1.2 GB.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def limit_threads(threads: int) -> None:
    """Limit torch to a number of threads, because other processes on the host also run models."""
    torch.set_num_threads(threads)

"""Loading of captioning models in Spark tasks. On a CPU, all tasks of a host share one copy of the weights in memory.

On a CPU, each task maps a weights file read-only, so the pages of the file are in memory only once. The mapped file is
the model's own file, a copy of this file on a local disk, or a file of converted weights. The first task of the host
writes the file of converted weights.
On a GPU, each task has its own copy of the weights in GPU memory, because CUDA shares memory between processes only
while the process that allocated the memory is running.

The module `pipelines.worker.caption`, which imports torch, is imported inside the function, so that the driver can
import this module without torch.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.executor.model_cache import converted_copy, local_copy
from vlm.config import Precision

if TYPE_CHECKING:
    from vlm.captioner import Captioner


def load_shared_captioner(
    folder: Path, digest: str, *, remote: bool, threads: int, precision: Precision = Precision.FP32
) -> Captioner:
    """Load the model of a job for this process, and limit torch to the threads of a Spark task.

    Args:
        folder: folder of the model's weights, config and tokenizer.
        digest: digest of the model, or empty if the digest is not known.
        remote: whether `folder` is on a network, so that the host needs a copy on a local disk.
        threads: number of torch threads in each Spark task.
        precision: number format in which the model computes.

    Raises:
        CheckpointError: the folder does not contain a model.
        StageFailed: another user could replace models in the cache, or the files do not have the digest.
        UserError: the precision needs a library that is not installed.
        OSError: the model's folder cannot be read, or the disk is full.
    """
    from pipelines.worker.caption import conversion_key, convert_model, limit_threads, load_captioner, needs_conversion

    limit_threads(threads)
    if remote:
        folder = local_copy(folder, digest)
    if needs_conversion(folder, precision):
        precision.require()
        convert = partial(convert_model, precision=precision)
        folder = converted_copy(folder, digest, conversion_key(precision), convert)
    return load_captioner(str(folder), precision)

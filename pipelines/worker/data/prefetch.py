"""Function that copies the next batch to the GPU on a separate CUDA stream, while the GPU computes the current step."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vlm.batch import Batch


def prefetch_to_device(batches: Iterator[list[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """Copy each batch to the device and yield the copy.

    The next batch is copied to a GPU while the GPU computes the training step of the current batch.

    Args:
        batches: batches as lists of smaller batches, in pinned memory if the device is a GPU.
        device: device of the model. Batches for a CPU are yielded unchanged.
    """
    if device.type != "cuda":
        yield from batches
        return
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    computing = torch.cuda.current_stream(device)

    def start_copy() -> list[Batch] | None:
        batch = next(batches, None)
        with torch.cuda.stream(copying):
            return batch and [part.to(device) for part in batch]

    following = start_copy()
    while following:
        computing.wait_stream(copying)
        batch, following = following, start_copy()
        for part in batch:
            for tensor in part.tensors():
                tensor.record_stream(computing)  # keep the memory of the tensor until the step is done
        yield batch

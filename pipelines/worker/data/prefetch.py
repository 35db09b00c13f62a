"""Batches to a GPU while it computes: the copy of the next one has a stream of its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vlm.batch import Batch


def copied_ahead(batches: Iterator[list[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """The same batches; those for a GPU are there already, copied during the step before theirs.

    Args:
        batches: in parts; pinned where the device is a GPU.
        device: where the model is. On a CPU the batches are handed on as they are.
    """
    if device.type != "cuda":
        yield from batches
        return
    beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    computing = torch.cuda.current_stream(device)

    def begun() -> list[Batch] | None:
        batch = next(batches, None)
        with torch.cuda.stream(beside):
            return batch and [part.to(device) for part in batch]

    coming = begun()
    while coming:
        computing.wait_stream(beside)
        batch, coming = coming, begun()
        for part in batch:
            for tensor in part.tensors():
                tensor.record_stream(computing)  # its memory is not given away before the step is through with it
        yield batch

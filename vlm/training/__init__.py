"""Training of a model: the training loop, losses, the optimizer, parallel ranks, adapters and the training state.

The training loop takes batches from an iterable and reports through a callback, so the package does not depend on
shards or run folders. Start reading in `loop.py`.
"""

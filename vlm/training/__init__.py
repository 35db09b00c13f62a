"""Training of a model: the loop, the loss, the optimizer, parallel ranks, adapters and the saved state.

The package takes batches from an iterable and reports through a callback: it knows neither shards nor run folders.
Start reading in `loop.py`.
"""

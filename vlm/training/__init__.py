"""Training a model: the loop, the loss, the optimizer, ranks and adapters.

Start reading in `loop.py`. Plain torch: where batches come from and where metrics go is the caller's business.
"""

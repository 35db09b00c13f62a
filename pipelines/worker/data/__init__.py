"""Training data of a rank: row order, batches, augmentation, copying to the GPU, and the cache of shard files.

Start reading in `order.py`, which picks the rows of each step. The package may import torch, but never pyspark, MLflow
or Delta.
"""

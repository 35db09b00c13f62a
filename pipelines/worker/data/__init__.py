"""Rows for a rank: their order, batches, augmentation, and copies of shards on a local disk.

Start reading in `order.py`, a pure function. May import torch; never pyspark, MLflow or Delta.
"""

"""Code that runs in torch ranks: training, and the models that executors caption and score with.

Start reading in `main.py`, the entry point of a rank, then `rank/` (process of a rank), `data/order.py` (rows of a
rank) and `train/trainer.py` (training). The package may import torch, but never pyspark, MLflow or Delta.
"""

"""Code that uses torch: training in ranks, and the models with which executors caption and score pictures.

Start reading in `main.py`, the entry point of a rank, then `rank/` (process of a rank), `data/order.py` (rows of a
rank) and `train/trainer.py` (training). The package may import torch, but never pyspark, MLflow or Delta.
"""

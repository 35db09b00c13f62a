"""Code that runs in torch ranks: training, and the models that executors caption and score with.

Start reading in `main.py`, the entry point of a rank: `rank/` sets up its process, `data/order.py` picks its rows, and
`train/trainer.py` trains. May import torch; never pyspark, MLflow or Delta.
"""
